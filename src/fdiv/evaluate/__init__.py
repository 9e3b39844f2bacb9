"""What a divergence did to a model: accuracy, diversity, calibration and honest intervals.

The report is `fdiv.evaluate.report.write_report`; it needs matplotlib and jinja2 and is therefore
not imported here.
"""

from .calibration import brier as brier
from .calibration import ece_null as ece_null
from .calibration import expected_calibration_error as expected_calibration_error
from .calibration import reliability as reliability
from .diversity import coverage_at_k as coverage_at_k
from .diversity import distinct_n as distinct_n
from .diversity import effective_number as effective_number
from .diversity import rarefied_coverage as rarefied_coverage
from .intervals import Interval as Interval
from .intervals import bootstrap_interval as bootstrap_interval
from .intervals import paired_difference as paired_difference
from .intervals import student_interval as student_interval
from .pass_at_k import exact_pass_at_k as exact_pass_at_k
from .pass_at_k import pass_at_k as pass_at_k
