"""Stand-ins for the weights of VBench's dimensions, made by its own model classes; run with the Python of its environment.

They are no trained models, and are made so that the score is known: RAFT sees no motion, or 160 pixels of it everywhere; AMT
takes the mean of two frames for the one between them; DINO's features are the mean colours of a frame.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

DINO = """
import torch

dependencies = ["torch"]


class Colours(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.zeros(()))

    def forward(self, images):
        return self.scale * images.mean((2, 3)) + 10


def dino_vitb16(pretrained=True, **kwargs):
    model = Colours()
    url = "https://dl.fbaipublicfiles.com/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth"
    model.load_state_dict(torch.hub.load_state_dict_from_url(url=url, map_location="cpu"))
    return model
"""


def main(child: str, cache: Path, motion: float) -> None:
    spec = importlib.util.spec_from_file_location("child", child)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    kept = module.declare_operators()
    import torch
    import vbench
    from omegaconf import OmegaConf
    from vbench.third_party.amt.utils.build_utils import build_from_cfg
    from vbench.third_party.RAFT.core.raft import RAFT

    def save(place: str, data: object) -> None:
        path = cache / place
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(data, path)

    def zeros(model: torch.nn.Module) -> dict[str, torch.Tensor]:
        return {name: torch.zeros_like(value) for name, value in model.state_dict().items()}

    raft = zeros(RAFT(argparse.Namespace(small=False, mixed_precision=False, alternate_corr=False)))
    raft["update_block.flow_head.conv2.bias"] += motion
    save("raft_model/models/raft-things.pth", {f"module.{name}": value for name, value in raft.items()})
    settings = Path(vbench.__file__).with_name("third_party") / "amt" / "cfgs" / "AMT-S.yaml"
    save("amt_model/amt-s.pth", {"state_dict": zeros(build_from_cfg(OmegaConf.load(settings).network))})
    save("dino_model/dino_vitbase16_pretrain.pth", {"scale": torch.ones(())})
    code = cache / "dino_model" / "facebookresearch_dino_main"
    code.mkdir(parents=True, exist_ok=True)
    (code / "hubconf.py").write_text(DINO)
    del kept


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
