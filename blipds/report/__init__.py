"""`report.html` in a run directory: facts about the run, its curves and metrics, and a gallery of captions.

One self-contained file: no network, no server. It is written again from the run directory after each evaluation,
and by `launch/report.py` at any time.
"""
