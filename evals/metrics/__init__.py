"""Full-reference quality metrics of clips. A new one is one file and one line here."""

from diffusers_accel.evals.metrics.lpips import LPIPS
from diffusers_accel.evals.metrics.metric import Metric, MetricUnavailable, Score, score_clip
from diffusers_accel.evals.metrics.psnr import PSNR
from diffusers_accel.evals.metrics.ssim import SSIM

METRICS: dict[str, Metric] = {metric.name: metric for metric in (PSNR, SSIM, LPIPS)}

__all__ = ["METRICS", "Metric", "MetricUnavailable", "Score", "score_clip"]
