"""The quality-speed report: report.json, report.md and one self-contained page."""

from diffusers_accel.evals.report.findings import Clip, Media, Subject
from diffusers_accel.evals.report.report import Report, check_report_folder

__all__ = ["Clip", "Media", "Report", "Subject", "check_report_folder"]
