"""What can run here, and what could be won for one call of a pipeline, before anybody waits for a video."""

from diffusers_accel.doctor.diagnosis import CacheOutlook, CallDiagnosis, Diagnosis, Expectation
from diffusers_accel.doctor.examine import DENSITIES, check_densities, diagnose
from diffusers_accel.doctor.speedup import speedup

__all__ = [
    "DENSITIES",
    "CacheOutlook",
    "CallDiagnosis",
    "Diagnosis",
    "Expectation",
    "check_densities",
    "diagnose",
    "speedup",
]
