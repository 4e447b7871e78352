"""`report.html` in a run directory: what the run was, its curves, its metrics, and captions to look at.

One file that needs nothing else: no network, no server. It is made anew from the run directory after each evaluation,
and by `launch/report.py` at any time.
"""

from blipds.report.gallery import HeatMap
from blipds.report.machine import machine_facts
from blipds.report.page import REPORT, Shown, shown_captions, write_report
from blipds.report.run_files import write_cider

__all__ = ["REPORT", "HeatMap", "Shown", "machine_facts", "shown_captions", "write_cider", "write_report"]
