"""Train a `scenes` checkpoint: a small CLIP on generated images, on a CPU, resumable and seeded.

    python dev/train_scenes.py --captions clean --output runs/scenes-clean
    python dev/train_scenes.py --captions noisy --output runs/scenes-noisy

`clean` sees few images often and so grows overconfident; `noisy` sees many, a share of them with the caption of another
image and with words missing, and so stays underconfident. Both are open_clip's own model and loss. The learning rate
falls to zero with the steps. Kill it and start it again with the same command: it goes on from its last save, with the
same batches. A run takes about 11 minutes on one core: two side by side with `--threads 1` suit a machine of two.
The dev split decides nothing but what is printed and noted in facts.json.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import random
import time
from pathlib import Path

import open_clip
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from qclip.data import scenes
from qclip.files import write_atomic

CONFIG = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 128, "head_width": 64, "patch_size": 4},
    "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
SETTINGS = {  # images in the training set, share of captions that belong to another image, share of words dropped
    "clean": {"images": 12_000, "shuffled": 0.0, "dropped": 0.0, "steps": 1200},
    "noisy": {"images": 50_000, "shuffled": 0.12, "dropped": 0.1, "steps": 1200},
}
CAPTION_SHARES = (0.2, 0.2, 0.3, 0.3)  # of the captions that an image has
BATCH, RATE, WARMUP = 128, 2e-3, 60
MEAN, STD = (torch.tensor(v)[:, None, None] for v in (open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD))


def caption_tokens(captions: list[list[str]], shuffled: float, dropped: float, seed: int, tokenizer) -> torch.Tensor:
    """int64 `[n, captions, context]`, with the noise that was asked for."""
    rng = random.Random(seed)
    victims = [i for i in range(len(captions)) if rng.random() < shuffled]
    owner = list(range(len(captions)))
    for here, there in zip(victims, rng.sample(victims, len(victims)), strict=True):
        owner[here] = there
    lines = []
    for i in owner:
        for line in captions[i]:
            kept = [w for w in line.split() if rng.random() >= dropped]
            lines.append(" ".join(kept) or line.split()[-1])
    return tokenizer(lines).reshape(len(captions), len(CAPTION_SHARES), -1)


def normalised(pixels: torch.Tensor) -> torch.Tensor:
    """uint8 `[B, H, W, 3]` -> float `[B, 3, H, W]`."""
    return (pixels.permute(0, 3, 1, 2).float() / 255 - MEAN) / STD


@torch.inference_mode()
def judge(model: torch.nn.Module, tokenizer, split: str) -> dict[str, float]:
    """Zero-shot top-1 and signed calibration gap (mean confidence - accuracy) of a split."""
    data = scenes.load_scenes(split)
    pixels, labels = torch.from_numpy(scenes.draw(split, data.rows)), torch.from_numpy(data.labels)
    texts = [model.encode_text(tokenizer([p.format(c) for c in data.classes]), normalize=True) for p in data.prompts]
    heads = F.normalize(torch.stack(texts).mean(0), dim=-1)
    images = torch.cat([model.encode_image(normalised(part), normalize=True) for part in pixels.split(500)])
    confidence, guess = (model.logit_scale.exp() * images @ heads.T).double().softmax(1).max(1)
    accuracy = (guess == labels).double().mean().item()
    return {"top1": accuracy, "signed_gap": confidence.mean().item() - accuracy}


def optimizers(model: torch.nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the blocks, AdamW for the rest."""
    named = dict(model.named_parameters())
    matrices = [p for n, p in named.items() if p.ndim == 2 and "resblocks" in n]
    decay = [p for n, p in named.items() if p.ndim >= 2 and "resblocks" not in n]
    plain = [p for p in named.values() if p.ndim < 2]
    return [
        torch.optim.Muon(matrices, lr=RATE, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=RATE,
            betas=(0.9, 0.98),
        ),
    ]


def save(path: Path, state: dict) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(path, content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", choices=list(SETTINGS), required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, help="default: the setting's own")
    parser.add_argument("--images", type=int, help="size of the training set; default: the setting's own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    setting = {**SETTINGS[args.captions], **{k: v for k, v in vars(args).items() if k in ("steps", "images") and v}}
    args.output.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    data = scenes.load_scenes("train", setting["images"])
    pixels = torch.from_numpy(scenes.draw("train", data.rows))
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    tokens = caption_tokens(data.captions, setting["shuffled"], setting["dropped"], args.seed, tokenizer)
    model, loss_of = open_clip.CLIP(**CONFIG), open_clip.ClipLoss()
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.99))
    trained, step, spent = optimizers(model), 0, 0.0
    checkpoint = args.output / "state.pt"
    run = {**setting, "seed": args.seed, "data": data.digest}
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        if state["run"] != run:
            raise SystemExit(f"{checkpoint} is of another run ({state['run']}, not {run}); choose another --output.")
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(trained, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, spent = state["step"], state["spent"]
        print(f"goes on from step {step}", flush=True)

    tick = time.perf_counter()
    while step < setting["steps"]:
        rate = RATE * min(1.0, (step + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * step / setting["steps"]))
        for optimizer in trained:
            for group in optimizer.param_groups:
                group["lr"] = rate
        generator = torch.Generator().manual_seed(args.seed * 1_000_003 + step)  # a batch depends on its step alone
        rows = torch.randperm(len(pixels), generator=generator)[:BATCH]
        which = torch.multinomial(torch.tensor(CAPTION_SHARES), len(rows), replacement=True, generator=generator)
        # the fused attention of a CPU spends most of the step in its backward pass at these small shapes
        with sdpa_kernel(SDPBackend.MATH), torch.autocast("cpu", torch.bfloat16):
            image, text = model.encode_image(normalised(pixels[rows])), model.encode_text(tokens[rows, which])
        loss = loss_of(F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), model.logit_scale.exp())
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in trained:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        average.update_parameters(model)
        step += 1
        now = time.perf_counter()
        spent, tick = spent + now - tick, now
        if step % 50 == 0:
            print(
                f"step {step} loss {loss.item():.3f} scale {model.logit_scale.exp().item():.1f} "
                f"images/s {step * BATCH / spent:.0f}",
                flush=True,
            )
        if step % 100 == 0 or step == setting["steps"]:
            average.eval()
            dev = judge(average.module, tokenizer, "dev")
            print(f"step {step} dev top-1 {100 * dev['top1']:.1f} % gap {100 * dev['signed_gap']:+.1f}", flush=True)
            save(
                checkpoint,
                {
                    "run": run,
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "step": step,
                    "spent": spent,
                    "optimizers": [o.state_dict() for o in trained],
                },
            )
            save(args.output / "open_clip.pt", average.module.state_dict())
            facts = {
                "config": CONFIG,
                "captions": args.captions,
                **run,
                "steps": step,
                "images_seen": step * BATCH,
                "minutes": round(spent / 60, 1),
                "dev_top1": dev["top1"],
                "dev_signed_gap": dev["signed_gap"],
                "logit_scale": average.module.logit_scale.exp().item(),
            }
            write_atomic(args.output / "facts.json", json.dumps(facts, indent=1).encode())
            tick = time.perf_counter()


if __name__ == "__main__":
    main()
