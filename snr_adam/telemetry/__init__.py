"""Seeing signal and noise while a model trains: measure, report, draw, log.

    observe(tx)                                  measures on the device              observe.py
    report(opt_state), metrics, histograms       numbers for people and loggers      report.py, trackers.py
    History                                      reports over time, on disk          history.py
    noise_scale                                  B_simple by several methods         noise_scale.py
    advise                                       what to do with it                  advice.py
    alarms(history)                              what to look at, in sentences       alarms.py

`snr_adam.telemetry.plots` draws; it needs matplotlib and is imported by itself.
"""

from snr_adam.telemetry import noise_scale
from snr_adam.telemetry._state import ObserveState
from snr_adam.telemetry.advice import advise
from snr_adam.telemetry.alarms import Alarm, alarms
from snr_adam.telemetry.history import History
from snr_adam.telemetry.observe import observe
from snr_adam.telemetry.report import Report, report
from snr_adam.telemetry.trackers import histograms, metrics

__all__ = [
    "Alarm",
    "History",
    "ObserveState",
    "Report",
    "advise",
    "alarms",
    "histograms",
    "metrics",
    "noise_scale",
    "observe",
    "report",
]
