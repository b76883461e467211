"""The quality-speed report: report.json, report.md and one self-contained page."""

from diffusers_accel.evals.report.report import Clip, Media, Report, Subject, check_report_folder

__all__ = ["Clip", "Media", "Report", "Subject", "check_report_folder"]
