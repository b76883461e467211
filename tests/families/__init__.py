"""One tiny real pipeline of each family, and what is known of it; `test_every_family.py` runs them through the same tests."""

from tests.families.allegro import ALLEGRO
from tests.families.cogvideox import COGVIDEOX
from tests.families.consisid import CONSISID
from tests.families.cosmos import COSMOS_1, COSMOS_1_VIDEO, COSMOS_2_5, COSMOS_2_VIDEO
from tests.families.cosmos3 import COSMOS3, COSMOS3_SOUND
from tests.families.easyanimate import EASYANIMATE
from tests.families.family import TinyFamily
from tests.families.hunyuan_video import HUNYUAN_VIDEO
from tests.families.kandinsky5 import KANDINSKY5, KANDINSKY5_NABLA
from tests.families.kandinsky6 import KANDINSKY6, KANDINSKY6_IMAGE
from tests.families.kandinsky6_sr import KANDINSKY6_SR
from tests.families.latte import LATTE
from tests.families.ltx import LTX
from tests.families.wan import WAN

TINY: dict[str, TinyFamily] = {
    "wan": WAN,
    "hunyuan_video": HUNYUAN_VIDEO,
    "cogvideox": COGVIDEOX,
    "ltx": LTX,
    "consisid": CONSISID,
    "allegro": ALLEGRO,
    "easyanimate": EASYANIMATE,
    "latte": LATTE,
    "cosmos, 1": COSMOS_1,
    "cosmos, 1 video to world": COSMOS_1_VIDEO,
    "cosmos, 2 video to world": COSMOS_2_VIDEO,
    "cosmos, 2.5": COSMOS_2_5,
    "kandinsky5": KANDINSKY5,
    "kandinsky5, image with nabla": KANDINSKY5_NABLA,
    "kandinsky6": KANDINSKY6,
    "kandinsky6, image": KANDINSKY6_IMAGE,
    "kandinsky6_sr": KANDINSKY6_SR,
    "cosmos3": COSMOS3,
    "cosmos3, sound": COSMOS3_SOUND,
}

__all__ = ["TINY", "TinyFamily"]
