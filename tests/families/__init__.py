"""One tiny real pipeline of each family, and what is known of it; `test_every_family.py` runs them through the same tests."""

from tests.families.cogvideox import COGVIDEOX
from tests.families.family import TinyFamily
from tests.families.hunyuan_video import HUNYUAN_VIDEO
from tests.families.ltx import LTX
from tests.families.wan import WAN

TINY: dict[str, TinyFamily] = {
    "wan": WAN,
    "hunyuan_video": HUNYUAN_VIDEO,
    "cogvideox": COGVIDEOX,
    "ltx": LTX,
}

__all__ = ["TINY", "TinyFamily"]
