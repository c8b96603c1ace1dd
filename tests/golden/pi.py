"""The numbers of LeRobot's own pi0.5, and the names and shapes of its pi0 and pi0.5, in sizes that take a second.

LeRobot 0.6.1 asks for Python 3.12, which its models don't need, and for transformers below 5.6: the script takes its
unpacked wheel, stands in for what surrounds the models, and runs beside an older transformers:

    pip download lerobot==0.6.1 --no-deps --ignore-requires-python -d /tmp/wheel
    unzip -q /tmp/wheel/lerobot-0.6.1-py3-none-any.whl -d /tmp/lerobot
    pip install --no-deps --target /tmp/older transformers==5.5.4 tokenizers==0.22.2 \
        huggingface-hub==1.33.0 httpx==0.28.1 httpcore==1.0.9
    PYTHONPATH=/tmp/older python -m tests.golden.pi /tmp/lerobot

Weights and inputs are keyed by name (`weight`, `inputs`), so that the file holds results only.
"""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import torch

from opentau_train import rng

FILE = Path(__file__).parent / "pi.json"
WIDTH, EXPERT_WIDTH, DEPTH, HEADS, HEAD_DIM, VOCAB = 32, 16, 2, 8, 8, 384  # LeRobot's code has 8 heads written into it
MLP, EXPERT_MLP = 64, 32
VISION = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
PATCH, IMAGE = 14, 28
NUM, STEPS, DIMS, TOKENS = 3, 6, 8, 12


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """A parameter in LeRobot's name: normal(0, 0.2), large enough for every part to matter."""
    numbers = rng.normal(rng.key("golden", "pi", name), int(np.prod(shape)))
    return torch.from_numpy((0.2 * numbers).astype(np.float32).reshape(shape))


def inputs() -> dict[str, torch.Tensor]:
    """`frames` [B, 2, 3, H, W] uint8, of which camera 1 of sample 1 is absent (`present` [B, 2]); `tokens` [B, N] with
    `has_token`; `state`, `actions`, `noise` [B, T, D] f32; `time` [B]."""

    def normal(name: str, *shape: int) -> torch.Tensor:
        numbers = rng.normal(rng.key("golden", "pi", "input", name), int(np.prod(shape)))
        return torch.from_numpy(numbers.astype(np.float32).reshape(shape))

    present = torch.ones(NUM, 2, dtype=torch.bool)
    present[1, 1] = False
    lengths = torch.tensor([TOKENS, 5, 9])
    tokens = (normal("tokens", NUM, TOKENS).abs() * 100).long().clamp(1, VOCAB - 1)
    return {
        "frames": (normal("frames", NUM, 2, 3, IMAGE, IMAGE) * 60 + 128).clamp(0, 255).to(torch.uint8),
        "present": present,
        "tokens": tokens,
        "has_token": torch.arange(TOKENS) < lengths[:, None],
        "state": normal("state", NUM, DIMS),
        "actions": normal("actions", NUM, STEPS, DIMS),
        "noise": normal("noise", NUM, STEPS, DIMS),
        "time": torch.tensor([0.25, 0.5, 0.9]),
    }


def make(lerobot: Path) -> dict[str, Any]:
    """The golden file's content, by the LeRobot that is unpacked at `lerobot`."""
    made: dict[str, Any] = {}
    for name, module in _modules(lerobot).items():
        model = _tiny(module, "PI05Pytorch" if name == "pi05" else "PI0Pytorch")
        made[name] = {
            "shapes": {key: list(value.shape) for key, value in model.state_dict().items()},
            **_run(name, model),
        }
    return made


def _run(name: str, model: torch.nn.Module) -> dict[str, Any]:
    with torch.no_grad():
        for key, value in model.named_parameters():
            value.copy_(weight(key, tuple(value.shape)))
    given = inputs()
    frames = given["frames"].float() / 255 * 2 - 1
    images, masks = list(frames.unbind(1)), list(given["present"].unbind(1))
    seen = [images, masks, given["tokens"], given["has_token"], *([given["state"]] if name == "pi0" else [])]
    errors = model(*seen, given["actions"], given["noise"], given["time"])
    errors.sum().backward()
    gradients = {key: float(p.grad.norm()) for key, p in model.named_parameters() if p.grad is not None}
    chunk = model.sample_actions(*seen, noise=given["noise"], num_steps=4)
    return {"errors": errors.tolist(), "gradients": gradients, "chunk": chunk.tolist()}


def _tiny(module: Any, cls: str) -> torch.nn.Module:
    """LeRobot's model in the sizes above, built by its own code."""
    sizes = {"gemma_2b": (WIDTH, MLP), "gemma_300m": (EXPERT_WIDTH, EXPERT_MLP)}
    module.get_gemma_config = lambda variant: types.SimpleNamespace(
        width=sizes[variant][0],
        depth=DEPTH,
        mlp_dim=sizes[variant][1],
        num_heads=HEADS,
        num_kv_heads=1,
        head_dim=HEAD_DIM,
    )
    vlm, expert = module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM

    def tiny_vlm(config: Any) -> torch.nn.Module:
        for key, value in {**VISION, "patch_size": PATCH, "image_size": IMAGE, "projection_dim": WIDTH}.items():
            setattr(config.vision_config, key, value)
        config.text_config.vocab_size = VOCAB
        return vlm(config=config)

    def tiny_expert(config: Any) -> torch.nn.Module:
        config.vocab_size = VOCAB
        return expert(config=config)

    module.PaliGemmaForConditionalGenerationWithPiGemma, module.PiGemmaForCausalLM = tiny_vlm, tiny_expert
    config = types.SimpleNamespace(
        paligemma_variant="gemma_2b",
        action_expert_variant="gemma_300m",
        image_resolution=(IMAGE, IMAGE),
        dtype="float32",
        freeze_vision_encoder=False,
        train_expert_only=False,
        max_state_dim=DIMS,
        max_action_dim=DIMS,
        chunk_size=STEPS,
        compile_model=False,
        min_period=4e-3,
        max_period=4.0,
        rtc_config=None,
        num_inference_steps=4,
    )
    return getattr(module, cls)(config).eval()


def _modules(lerobot: Path) -> dict[str, Any]:
    """LeRobot's two modules, without the packages around them."""
    root = lerobot / "lerobot"

    def package(name: str, **attributes: Any) -> None:
        made = types.ModuleType(name)
        made.__path__ = [str(root.joinpath(*name.split(".")[1:]))]
        made.__dict__.update(attributes)
        sys.modules[name] = made

    for name in ("", ".policies", ".policies.pi0", ".policies.pi05", ".policies.common", ".policies.rtc", ".utils"):
        package(f"lerobot{name}")
    package("lerobot.utils.import_utils", _transformers_available=True, require_package=lambda *_, **__: None)
    package("lerobot.configs", PreTrainedConfig=object)
    package("lerobot.policies.pretrained", PreTrainedPolicy=object, T=None)
    package("lerobot.policies.rtc.modeling_rtc", RTCProcessor=object)
    package("lerobot.policies.pi05.configuration_pi05", PI05Config=object, DEFAULT_IMAGE_SIZE=IMAGE)
    package("lerobot.policies.pi0.configuration_pi0", PI0Config=object, DEFAULT_IMAGE_SIZE=IMAGE)
    from lerobot.policies.pi0 import modeling_pi0
    from lerobot.policies.pi05 import modeling_pi05

    return {"pi0": modeling_pi0, "pi05": modeling_pi05}


def main() -> None:
    torch.set_num_threads(1)
    FILE.write_text(
        json.dumps(make(Path(sys.argv[1])), indent=None, separators=(",", ":")).replace('},"', '},\n"') + "\n"
    )
    print(FILE)


if __name__ == "__main__":
    main()
