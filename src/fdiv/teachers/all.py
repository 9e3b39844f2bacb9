"""The sources of a teacher's signal that a recipe can name."""

from fdiv.teachers.cache import Cached as Cached
from fdiv.teachers.local import Local as Local
from fdiv.teachers.served import Served as Served
