"""One tiny real pipeline of each family, and what is known of it; `test_every_family.py` runs them through the same tests."""

from tests.families.allegro import ALLEGRO
from tests.families.anyflow import ANYFLOW
from tests.families.anyflow_far import ANYFLOW_FAR
from tests.families.chronoedit import CHRONOEDIT
from tests.families.cogvideox import COGVIDEOX
from tests.families.consisid import CONSISID
from tests.families.cosmos import COSMOS_1, COSMOS_1_VIDEO, COSMOS_2_5, COSMOS_2_VIDEO
from tests.families.cosmos3 import COSMOS3, COSMOS3_SOUND
from tests.families.easyanimate import EASYANIMATE
from tests.families.family import TinyFamily
from tests.families.framepack import FRAMEPACK
from tests.families.helios import HELIOS
from tests.families.hunyuan_video import HUNYUAN_VIDEO
from tests.families.hunyuan_video15 import HUNYUAN_VIDEO15, HUNYUAN_VIDEO15_IMAGE
from tests.families.kandinsky5 import KANDINSKY5, KANDINSKY5_NABLA
from tests.families.kandinsky6 import KANDINSKY6, KANDINSKY6_IMAGE
from tests.families.kandinsky6_sr import KANDINSKY6_SR
from tests.families.latte import LATTE
from tests.families.ltx import LTX, LTX_CONDITION
from tests.families.ltx2 import LTX2, LTX2_CONDITION, LTX2_IMAGE
from tests.families.minimax_h3 import MINIMAX_H3, MINIMAX_H3_FRAMES
from tests.families.mochi import MOCHI
from tests.families.motif_video import MOTIF_VIDEO, MOTIF_VIDEO_IMAGE
from tests.families.skyreels_v2 import SKYREELS_V2, SKYREELS_V2_FORCING, SKYREELS_V2_IMAGE
from tests.families.wan import WAN, WAN_EDIT, WAN_FIRST_FRAME, WAN_IMAGE
from tests.families.wan_animate import WAN_ANIMATE
from tests.families.wan_vace import WAN_VACE, WAN_VACE_REFERENCE

TINY: dict[str, TinyFamily] = {
    "wan": WAN,
    "wan, image to video": WAN_IMAGE,
    "wan, first frame": WAN_FIRST_FRAME,
    "wan, edit": WAN_EDIT,
    "wan_vace": WAN_VACE,
    "wan_vace, reference": WAN_VACE_REFERENCE,
    "wan_animate": WAN_ANIMATE,
    "skyreels_v2": SKYREELS_V2,
    "skyreels_v2, image to video": SKYREELS_V2_IMAGE,
    "skyreels_v2, diffusion forcing": SKYREELS_V2_FORCING,
    "chronoedit": CHRONOEDIT,
    "anyflow": ANYFLOW,
    "anyflow_far": ANYFLOW_FAR,
    "helios": HELIOS,
    "hunyuan_video": HUNYUAN_VIDEO,
    "cogvideox": COGVIDEOX,
    "ltx": LTX,
    "ltx, condition": LTX_CONDITION,
    "hunyuan_video15": HUNYUAN_VIDEO15,
    "hunyuan_video15, image to video": HUNYUAN_VIDEO15_IMAGE,
    "framepack": FRAMEPACK,
    "ltx2": LTX2,
    "ltx2, image to video": LTX2_IMAGE,
    "ltx2, condition": LTX2_CONDITION,
    "mochi": MOCHI,
    "motif_video": MOTIF_VIDEO,
    "motif_video, image to video": MOTIF_VIDEO_IMAGE,
    "minimax_h3": MINIMAX_H3,
    "minimax_h3, first and last frame": MINIMAX_H3_FRAMES,
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
