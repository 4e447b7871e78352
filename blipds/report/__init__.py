"""`report.html` in a run directory: facts about the run, its curves and metrics, and a gallery of captions.

One self-contained file: no network, no server. It is written again from the run directory after each evaluation,
and by `launch/report.py` at any time.
"""

from blipds.report.gallery import HeatMap, Shown
from blipds.report.machine import machine_facts
from blipds.report.page import REPORT, shown_captions, write_report
from blipds.report.run_files import write_cider

__all__ = ["REPORT", "HeatMap", "Shown", "machine_facts", "shown_captions", "write_cider", "write_report"]
