"""The smallest pi0 and pi0.5, batches with every kind of gap, and transformers' own pi0 with the same weights."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import tokenizers
import torch

from opentau_train.data.batch import Batch, stack
from opentau_train.data.transforms.pipeline import Pipeline, meet
from opentau_train.models.pi.pi0 import Pi0Policy
from opentau_train.models.pi.pi05 import Pi05Policy
from opentau_train.models.pi.policy import PiPolicy
from opentau_train.models.pi.sizes import ExpertSizes, GemmaSizes, VisionSizes
from opentau_train.types import BatchSpec

SPEC = BatchSpec(cameras=("left", "wrist"), image_size=(28, 28), history=0, state_dim=5, action_dim=4, chunk_length=6)
VLM = GemmaSizes(width=32, depth=2, mlp=64, heads=2, kv_heads=1, head_dim=16, vocab_size=384)
EXPERT = ExpertSizes(width=16, mlp=32)
VISION = VisionSizes(width=24, depth=2, mlp=48, heads=2, patch_size=14, image_size=28)
PROMPTS = ("put the cup on the plate", "", "öffne die_Schublade", "x" * 500)
TOKENS = {"action_tokens": "binned", "num_bins": 32}


def make_pi(cls: type[PiPolicy], spec: BatchSpec = SPEC, seed: int = 0, **changes) -> PiPolicy:
    torch.manual_seed(seed)
    options = dict(vlm=VLM, expert=EXPERT, vision=VISION, max_state_dim=8, max_action_dim=8, max_prompt_tokens=48)
    policy = cls(spec, **{**options, **changes})
    for name, parameter in policy.named_parameters():
        if ".dense." in name:  # adaptive norms begin shut
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def make_pi0(**changes) -> Pi0Policy:
    return make_pi(Pi0Policy, **changes)


def make_pi05(**changes) -> Pi05Policy:
    return make_pi(Pi05Policy, **changes)


def make_batch(policy: PiPolicy, num: int = 4, *, whole: bool = False, seed: int = 0) -> Batch:
    """Unless `whole`: sample 1 lacks state and prompt and both cameras, 2 the last dims, a camera and its last steps,
    what is missing holding garbage; the prompt of 3 is too long."""
    spec, g = meet(policy.spec, policy.wants()), np.random.default_rng(seed)
    samples = []
    for i in range(num):
        empty, part = (i == 1 and not whole), (i == 2 and not whole)
        cameras = spec.cameras[: 0 if empty else 1 if part else None]
        state_dims = np.arange(spec.state_dim) < (0 if empty else spec.state_dim - 2 * part)
        action_dims = np.arange(spec.action_dim) < spec.action_dim - part
        steps = np.arange(spec.chunk_length) >= (spec.chunk_length - 2 if part else spec.chunk_length)
        actions = g.standard_normal((spec.chunk_length, spec.action_dim)).astype(np.float32)
        record = {
            "images": {c: g.integers(0, 256, (1, *spec.image_size, 3)).astype(np.uint8) for c in cameras},
            "state": g.uniform(-1.2, 1.2, spec.state_dim).astype(np.float32),
            "state_dim_mask": state_dims,
            "actions": actions * action_dims,
            "action_is_pad": steps,
            "action_dim_mask": action_dims,
            "prompt": PROMPTS[0] if whole else PROMPTS[i % len(PROMPTS)],
            "mode": "policy",
            "key": i,
            "weight": 1.0,
        }
        samples.append(Pipeline(policy.wants().transforms)(record, i, training=True))
    return stack(samples, spec)


class Given:
    """Draws that are given: `noise` [B, T, A] f32 of all dimensions that the policy holds, and the uniform number
    [B] behind its flow time."""

    def __init__(self, policy: PiPolicy, num: int, seed: int = 0):
        g = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(num, policy.spec.chunk_length, policy.max_action_dim, generator=g)
        self.number = torch.rand(num, generator=g)

    @property
    def time(self) -> torch.Tensor:
        """The flow time: Beta(1.5, 1), whose distribution function is t^1.5."""
        return 0.999 * self.number ** (2 / 3) + 0.001

    def normal(self, name: str, shape) -> torch.Tensor:
        assert self.noise.shape[1:] == tuple(shape)
        return self.noise

    def uniform(self, name: str) -> torch.Tensor:
        return self.number


def library_pi0() -> torch.nn.Module:
    """transformers' pi0 of the same sizes."""
    from transformers import PI0Config, PI0ForConditionalGeneration

    def gemma(width: int, mlp: int) -> dict:
        return {
            "model_type": "gemma",
            "hidden_size": width,
            "num_hidden_layers": VLM.depth,
            "intermediate_size": mlp,
            "num_attention_heads": VLM.heads,
            "num_key_value_heads": VLM.kv_heads,
            "head_dim": VLM.head_dim,
            "vocab_size": VLM.vocab_size,
        }

    siglip = {
        "model_type": "siglip_vision_model",
        "hidden_size": VISION.width,
        "intermediate_size": VISION.mlp,
        "patch_size": VISION.patch_size,
        "image_size": VISION.image_size,
        "num_hidden_layers": VISION.depth,
        "num_attention_heads": VISION.heads,
        "vision_use_head": False,
    }
    config = PI0Config(
        vlm_config={
            "model_type": "paligemma",
            "projection_dim": VLM.width,
            "image_token_id": VLM.vocab_size,
            "text_config": gemma(VLM.width, VLM.mlp),
            "vision_config": siglip,
        },
        dit_config=gemma(EXPERT.width, EXPERT.mlp),
        chunk_size=SPEC.chunk_length,
        max_state_dim=8,
        max_action_dim=8,
        loss_reduction="none",
    )
    torch.manual_seed(1)
    library = PI0ForConditionalGeneration(config)
    library.set_attn_implementation("sdpa")
    for name, parameter in library.named_parameters():
        if "norm" in name or name.endswith("bias"):
            torch.nn.init.normal_(parameter, std=0.1)  # as published weights have them, and 0 would hide a mistake
    return library


def library_name(own: str) -> str:
    """transformers' name of a parameter of `Pi0Policy`, written by hand: the loader's rules go the other way."""
    for pattern, name in (
        (r"layers\.(\d+)\.vlm\.", r"model.vlm.language_model.layers.\1."),
        (r"layers\.(\d+)\.expert\.", r"model.dit.layers.\1."),
        (r"vision\.layers\.", "model.vlm.vision_tower.encoder.layers."),
        (r"vision\.norm\.", "model.vlm.vision_tower.post_layernorm."),
        (r"vision\.projector\.", "model.vlm.multi_modal_projector.linear."),
        (r"vision\.", "model.vlm.vision_tower."),
        (r"token_embed\.", "model.vlm.language_model.embed_tokens."),
        (r"vlm_norm\.", "model.vlm.language_model.norm."),
        (r"expert_norm\.", "model.dit.norm."),
        (r"(action_out_proj\.)", r"\1"),
        (r"", "embed_action_time."),
    ):
        if re.match(pattern, own):
            return re.sub(f"^{pattern}", name, own, count=1)
    raise AssertionError(own)


def library_inputs(batch: Batch, policy: PiPolicy) -> dict[str, torch.Tensor]:
    """The batch as transformers' pi0 takes it: image tokens before the prompt's, absent cameras masked."""
    frames = torch.stack([batch.images[c][:, -1] for c in SPEC.cameras], dim=1)
    present = torch.stack([batch.camera_mask[c] for c in SPEC.cameras], dim=1)
    pictures = torch.full((len(batch), len(SPEC.cameras) * VISION.num_tokens), VLM.vocab_size)
    tokens = batch.prompt_tokens
    seen = present.repeat_interleave(VISION.num_tokens, 1)
    state = torch.where(batch.state_dim_mask, batch.state, 0.0)
    return {
        "state": torch.nn.functional.pad(state, (0, policy.max_state_dim - state.shape[1])),
        "input_ids": torch.cat([pictures, tokens.clamp(min=0)], dim=1),
        "pixel_values": frames.float() / 255 * 2 - 1,
        "pixel_attention_mask": torch.ones_like(present),
        "attention_mask": torch.cat([seen, tokens >= 0], dim=1).long(),
    }


def golden_pi(kind: str) -> PiPolicy:
    """pi0 or pi05 in the sizes and with the weights of `tests.golden.pi`."""
    from tests.golden import pi

    spec = BatchSpec(("a", "b"), (pi.IMAGE, pi.IMAGE), 0, pi.DIMS, pi.DIMS, pi.STEPS)
    policy = make_pi(
        Pi0Policy if kind == "pi0" else Pi05Policy,
        spec,
        vlm=GemmaSizes(pi.WIDTH, pi.DEPTH, pi.MLP, pi.HEADS, 1, pi.HEAD_DIM, pi.VOCAB),
        expert=ExpertSizes(pi.EXPERT_WIDTH, pi.EXPERT_MLP),
        vision=VisionSizes(24, 2, 48, 2, pi.PATCH, pi.IMAGE),
        max_prompt_tokens=pi.TOKENS,
        num_flow_steps=4,
    )
    names = {name: lerobot_name(name) for name, _ in policy.named_parameters()}
    with torch.no_grad():
        for name, parameter in policy.named_parameters():
            parameter.copy_(pi.weight(names[name], tuple(parameter.shape)))
    return policy


def lerobot_name(own: str) -> str:
    """LeRobot's name of a parameter, written by hand as `library_name` is."""
    vlm, expert = "paligemma_with_expert.paligemma.model", "paligemma_with_expert.gemma_expert.model"
    named = library_name(own).removeprefix("embed_action_time.")
    named = named.replace("model.vlm.vision_tower", f"{vlm}.vision_tower.vision_model")
    return named.replace("model.vlm", vlm).replace("model.dit", expert)


def golden_batch(policy: PiPolicy) -> tuple[Batch, Given]:
    """The inputs of `tests.golden.pi` as a batch and its draws."""
    from tests.golden import pi

    values = pi.inputs()
    batch, draws = make_batch(policy, pi.NUM, whole=True), Given(policy, pi.NUM)
    cameras = policy.spec.cameras
    draws.noise, draws.number = values["noise"], ((values["time"] - 0.001) / 0.999) ** 1.5
    batch = batch.replace(
        images={c: values["frames"][:, i, None] for i, c in enumerate(cameras)},
        camera_mask={c: values["present"][:, i] for i, c in enumerate(cameras)},
        prompt_tokens=torch.where(values["has_token"], values["tokens"], -1),
        state=values["state"],
        actions=values["actions"],
    )
    return batch, draws


def words_file(folder: Path) -> None:
    """A tokenizer.json of six words."""
    words = {"<pad>": 0, "<bos>": 1, "open": 2, "the": 3, "drawer": 4, "<unk>": 5}
    own = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    own.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    own.save(str(folder / "tokenizer.json"))


def fast_files(folder: Path) -> tokenizers.Tokenizer:
    """FAST's files, with a byte-level code as its own has, trained on nothing but noise."""
    g = np.random.default_rng(0)
    texts = ["".join(map(chr, (10 * g.standard_normal(24)).round().astype(int) + 200)) for _ in range(50)]
    own = tokenizers.ByteLevelBPETokenizer()
    own.train_from_iterator(texts, vocab_size=300)
    own.save(str(folder / "tokenizer.json"))
    options = {"scale": 10, "min_token": -200, "vocab_size": 300}
    (folder / "processor_config.json").write_text(json.dumps(options))
    return own


def published(policy: PiPolicy, layout: str) -> dict[str, torch.Tensor]:
    """The policy's weights as a file of `layout` has them: transformers, lerobot, openpi, and paligemma or an older
    paligemma for the language model alone. With what such files have besides."""
    own = {name: value for name, value in policy.state_dict().items() if not name.startswith("action_token")}
    table, expert = own["token_embed.weight"], torch.zeros(VLM.vocab_size, EXPERT.width)
    if layout == "transformers":
        return {library_name(n): v for n, v in own.items()} | {"model.dit.embed_tokens.weight": expert}
    if layout in ("lerobot", "openpi"):
        prefix = "model." if layout == "lerobot" else ""
        named = {prefix + lerobot_name(n): v for n, v in own.items()}
        head = f"{prefix}paligemma_with_expert.paligemma.lm_head.weight"
        if layout == "lerobot":  # as pi0_base: the head is there, the table, which is the same, isn't
            named.pop(f"{prefix}paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight")
            named[head] = table
        else:
            named[head] = torch.full_like(table, 9.0)
        return named | {f"{prefix}paligemma_with_expert.gemma_expert.lm_head.weight": expert}
    vlm = {n: v for n, v in own.items() if ".vlm." in n or n.startswith(("vision.", "token_embed.", "vlm_norm."))}
    named = {library_name(n).replace("model.vlm.", ""): v for n, v in vlm.items()}
    if layout == "paligemma":
        return {f"model.{n}": v for n, v in named.items()}
    named = {n.replace("vision_tower.", "vision_tower.vision_model."): v for n, v in named.items()}
    return {n.replace("language_model.", "language_model.model."): v for n, v in named.items()}
