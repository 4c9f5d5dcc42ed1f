from .checks.crosscheck import cross_check as cross_check
from .checks.swaps import summarise_swaps as summarise_swaps
from .citations.align import align as align
from .intake.rows import rows as rows
from .probe import Probe as Probe
from .report import figures as figures
from .report.page import write_report as write_report
from .suite import run_suite as run_suite
from .validation.selftest import selftest as selftest

__all__ = [
    "Probe",
    "align",
    "cross_check",
    "figures",
    "rows",
    "run_suite",
    "selftest",
    "summarise_swaps",
    "write_report",
]
