"""Quality metrics of four kinds: of frames beside dense ones, of one clip, of the latents behind it, of a set of clips.

A new one is one file here that makes a `FrameMetric`, `ClipMetric`, `LatentMetric` or `SetMetric`, and a line in `METRICS` (with
its import). Those of VBench are made of its table of dimensions, in one file.
"""

from diffusers_accel.evals.metrics.brisque import BRISQUE
from diffusers_accel.evals.metrics.clip_metric import ClipMetric, ClipScore
from diffusers_accel.evals.metrics.clip_set import ClipSet, SetClip
from diffusers_accel.evals.metrics.cvvdp import CVVDP
from diffusers_accel.evals.metrics.dists import DISTS
from diffusers_accel.evals.metrics.dynamic_degree import DYNAMIC_DEGREE
from diffusers_accel.evals.metrics.flickering import FLICKERING
from diffusers_accel.evals.metrics.flip import FLIP
from diffusers_accel.evals.metrics.frame_metric import FrameMetric, FrameScore
from diffusers_accel.evals.metrics.latent_cosine import LATENT_COSINE
from diffusers_accel.evals.metrics.latent_metric import LatentMetric, LatentScore
from diffusers_accel.evals.metrics.lpips import LPIPS
from diffusers_accel.evals.metrics.lpips_vgg import LPIPS_VGG
from diffusers_accel.evals.metrics.metric import AnyMetric, Latents, MetricUnavailable, Scored
from diffusers_accel.evals.metrics.ms_ssim import MS_SSIM
from diffusers_accel.evals.metrics.psnr import PSNR
from diffusers_accel.evals.metrics.psnr_pooled import PSNR_POOLED
from diffusers_accel.evals.metrics.set_metric import SetMetric, SetScore
from diffusers_accel.evals.metrics.ssim import SSIM
from diffusers_accel.evals.metrics.ssim_gaussian import SSIM_GAUSSIAN
from diffusers_accel.evals.metrics.vbench import VBENCH
from diffusers_accel.evals.metrics.vmaf import VMAF
from diffusers_accel.evals.metrics.warp_error import WARP_ERROR
from diffusers_accel.evals.metrics.xpsnr import XPSNR

_ALL: tuple[AnyMetric, ...] = (
    PSNR,
    SSIM,
    LPIPS,
    PSNR_POOLED,
    SSIM_GAUSSIAN,
    MS_SSIM,
    LPIPS_VGG,
    DISTS,
    VMAF,
    XPSNR,
    FLIP,
    CVVDP,
    FLICKERING,
    WARP_ERROR,
    DYNAMIC_DEGREE,
    BRISQUE,
    LATENT_COSINE,
    *VBENCH,
)
METRICS: dict[str, AnyMetric] = {each.name: each for each in _ALL}
# What the field reports, PSNR and SSIM in both ways that it does; others are measured where they are asked for.
DEFAULT = (PSNR.name, SSIM.name, LPIPS.name, PSNR_POOLED.name, SSIM_GAUSSIAN.name)

__all__ = [
    "DEFAULT",
    "METRICS",
    "AnyMetric",
    "ClipMetric",
    "ClipScore",
    "ClipSet",
    "FrameMetric",
    "FrameScore",
    "LatentMetric",
    "LatentScore",
    "Latents",
    "MetricUnavailable",
    "Scored",
    "SetClip",
    "SetMetric",
    "SetScore",
]
