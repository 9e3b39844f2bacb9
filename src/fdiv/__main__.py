"""python -m fdiv"""

from fdiv.cli import main

main()
