"""Train the `photos` checkpoint: a small CLIP on real images, on a CPU or a GPU, resumable.

    python dev/train_photos.py --data DIR --output runs/photos --minutes 90

DIR holds cifar10_train.parquet, tiny_imagenet_train_32.parquet and flickr8k_train_64.parquet (columns `image` and
`label` or `captions`, class names in the schema metadata). The learning rate falls with the *time* spent, so that any
budget ends in a finished model. Kill it and start it again with the same command: it goes on from its last save.
Nothing here reads a test set; `cifar10_dev` decides nothing but what is printed.
"""

import argparse
import io
import json
import math
import random
import time
from pathlib import Path

import numpy as np
import open_clip
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from qclip.files import write_atomic

CONFIG = {
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": 6, "width": 192, "head_width": 32, "patch_size": 4},
    "text_cfg": {"context_length": 32, "vocab_size": 49408, "width": 64, "heads": 2, "layers": 2},
}
MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
TEMPLATES = (
    "a photo of a {}.",
    "a picture of a {}.",
    "a {}.",
    "an image of a {}.",
    "a small photo of a {}.",
    "a blurry photo of a {}.",
    "a photo of the {}.",
    "a close-up photo of a {}.",
    # OpenAI's short list, the field's default: a model this small knows only the wordings that it was taught
    "itap of a {}.",
    "a bad photo of the {}.",
    "a origami {}.",
    "a photo of the large {}.",
    "a {} in a video game.",
    "art of the {}.",
    "a photo of the small {}.",
)
MIX = {"cifar10": 0.55, "tiny": 0.35, "flickr": 0.10}  # share of a batch


def decode(path: Path, side: int = 32) -> tuple[torch.Tensor, pq.ParquetFile]:
    table = pq.read_table(path)
    images = [Image.open(io.BytesIO(b)).convert("RGB") for b in table["image"].to_pylist()]
    images = [im if im.size == (side, side) else im.resize((side, side), Image.Resampling.LANCZOS) for im in images]
    return torch.from_numpy(np.stack([np.asarray(im) for im in images])), table


def jpeg_copy(images: torch.Tensor, seed: int) -> torch.Tensor:
    """Every image once through JPEG (4:2:0, quality 60..95): most CIFAR-10 test images reach us that way."""
    rng, out = random.Random(seed), torch.empty_like(images)
    for i, im in enumerate(images.numpy()):
        buffer = io.BytesIO()
        Image.fromarray(im).save(buffer, "JPEG", quality=rng.randint(60, 95), subsampling=2)
        out[i] = torch.from_numpy(np.asarray(Image.open(buffer)).copy())
    return out


def augment(x: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """uint8 [B,32,32,3] -> normalised float [B,3,32,32]: shifted crop, flip, brightness and contrast, colour cast."""
    b, side, pad = len(x), x.shape[1], 4
    x = F.pad(x.permute(0, 3, 1, 2).float() / 255, (pad,) * 4, mode="reflect")
    top, left = (torch.randint(0, 2 * pad + 1, (b, 1), generator=generator) for _ in range(2))
    rows, columns = top + torch.arange(side), left + torch.arange(side)
    flip = torch.rand(b, 1, generator=generator) < 0.5
    columns = torch.where(flip, columns.flip(1), columns)
    x = x[torch.arange(b)[:, None, None], :, rows[:, :, None], columns[:, None, :]].permute(0, 3, 1, 2)
    draw = lambda *shape: torch.rand(b, *shape, 1, 1, generator=generator) * 2 - 1  # noqa: E731
    mean = x.mean((1, 2, 3), keepdim=True)
    x = (x - mean) * (1 + 0.3 * draw(1)) + mean + 0.15 * draw(1) + 0.05 * draw(3)
    return (x.clamp(0, 1) - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]


class Source:
    """One Parquet set in memory, walked in seeded epochs; knows the caption of each row."""

    def __init__(self, path: Path, seed: int):
        self.images, table = decode(path)
        self.jpeg = jpeg_copy(self.images, seed)
        self.labels = table["label"].to_numpy() if "label" in table.column_names else None
        self.captions = table["captions"].to_pylist() if "captions" in table.column_names else None
        names = json.loads(table.schema.metadata.get(b"classes", b"[]"))
        self.names = [[s.strip() for s in n.split(",")] for n in names]
        self.order = torch.empty(0, dtype=torch.long)

    def draw(self, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
        while len(self.order) < n:
            self.order = torch.cat([self.order, torch.randperm(len(self.images), generator=generator)])
        rows, self.order = self.order[:n], self.order[n:]
        use_jpeg = torch.rand(n, 1, 1, 1, generator=generator) < 0.5
        return rows, torch.where(use_jpeg, self.jpeg[rows], self.images[rows])


def batch(sources: dict[str, Source], size: int, generator: torch.Generator, rng: random.Random):
    """Images, the texts of the batch (each class once, each caption once), and which text belongs to which image."""
    images, texts, target = [], [], []
    for name, source in sources.items():
        rows, pixels = source.draw(round(size * MIX[name]), generator)
        images.append(pixels)
        if source.labels is not None:  # equal class names are positives: one text per class, also for absent classes
            target += [len(texts) + int(source.labels[r]) for r in rows]
            texts += [rng.choice(TEMPLATES).format(rng.choice(n)) for n in source.names]
        else:
            target += range(len(texts), len(texts) + len(rows))
            texts += [rng.choice(source.captions[r]) for r in rows]
    return augment(torch.cat(images), generator), texts, torch.tensor(target)


def contrastive_loss(image, text, scale, target):
    """CLIP's loss where several images may share one text (UniCL): rows are cross entropy, columns share their mass."""
    logits = scale * image @ text.T
    positive = F.one_hot(target, len(text)).float().T
    present = positive.sum(1) > 0
    columns = (positive / positive.sum(1, keepdim=True).clamp(min=1) * F.log_softmax(logits.T, dim=1)).sum(1)
    return 0.5 * F.cross_entropy(logits, target) - 0.5 * columns[present].mean()


@torch.inference_mode()
def zero_shot(model, tokenizer, images, labels, names) -> float:
    prompts = torch.cat(
        [
            F.normalize(
                sum(model.encode_text(tokenizer([t.format(n) for n in names]), normalize=True) for t in TEMPLATES),
                dim=-1,
            )
        ]
    )
    x = (images.permute(0, 3, 1, 2).float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    guess = torch.cat([(model.encode_image(part, normalize=True) @ prompts.T).argmax(1) for part in x.split(500)])
    return (guess == torch.as_tensor(labels)).float().mean().item()


def optimizers(model: torch.nn.Module, rate: float):
    """Muon for the matrices of the blocks (needs about half the images of AdamW here), AdamW for the rest."""
    matrices = [p for n, p in model.named_parameters() if p.ndim == 2 and "resblocks" in n]
    known = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in known]
    decay = [p for p in rest if p.ndim >= 2]
    plain = [p for p in rest if p.ndim < 2]
    return [
        torch.optim.Muon(matrices, lr=rate, weight_decay=0.05, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(
            [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
            lr=rate,
            betas=(0.9, 0.98),
        ),
    ]


def save(path: Path, state: dict) -> None:
    content = io.BytesIO()
    torch.save(state, content)
    write_atomic(path, content.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, default=Path("runs/photos"))
    parser.add_argument("--minutes", type=float, default=90, help="training time in all, over every restart")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--drop", type=float, default=0.5, help="share of patches dropped until 75 %% of the time is over"
    )
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)

    sources = {
        name: Source(args.data / f"{file}.parquet", args.seed)
        for name, file in [
            ("cifar10", "cifar10_train"),
            ("tiny", "tiny_imagenet_train_32"),
            ("flickr", "flickr8k_train_64"),
        ]
    }
    dev_images, dev = decode(args.data / "cifar10_dev.parquet")
    dev_images, dev_labels = dev_images[:2000], dev["label"].to_numpy()[:2000]
    model = open_clip.CLIP(**CONFIG)
    tokenizer = open_clip.SimpleTokenizer(context_length=CONFIG["text_cfg"]["context_length"])
    average = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.998))
    trained = optimizers(model, args.rate)
    step, seen, spent = 0, 0, 0.0
    checkpoint = args.output / "state.pt"
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True)
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        for optimizer, saved in zip(trained, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        step, seen, spent = state["step"], state["seen"], state["spent"]
        print(f"goes on from step {step}, {spent / 60:.1f} minutes in", flush=True)
    generator = torch.Generator().manual_seed(args.seed + step)
    rng = random.Random(args.seed + step)

    def clock() -> float:  # processor time a thread: what others use of the machine, or a pause, is not training time
        return time.process_time() / torch.get_num_threads()

    tick = clock()
    while spent < args.minutes * 60:
        done = spent / (args.minutes * 60)
        rate = args.rate * min(1.0, (step + 1) / 300) * 0.5 * (1 + math.cos(math.pi * done))
        for optimizer in trained:
            for group in optimizer.param_groups:
                group["lr"] = rate
        model.visual.patch_dropout = (
            open_clip.transformer.PatchDropout(args.drop) if args.drop and done < 0.75 else torch.nn.Identity()
        )
        images, texts, target = batch(sources, args.batch, generator, rng)
        # The fused attention's backward is slow on a CPU at these lengths: plain products train faster.
        with torch.autocast("cpu", torch.bfloat16), sdpa_kernel(SDPBackend.MATH):
            image, text = model.encode_image(images), model.encode_text(tokenizer(texts))
        loss = contrastive_loss(
            F.normalize(image.float(), dim=-1), F.normalize(text.float(), dim=-1), model.logit_scale.exp(), target
        )
        for optimizer in trained:
            optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in trained:
            optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(0, math.log(100))
        average.update_parameters(model)
        step, seen = step + 1, seen + len(images)
        now = clock()
        spent, tick = spent + now - tick, now
        if step % 50 == 0:
            print(
                f"step {step} images {seen} minutes {spent / 60:.1f} loss {loss.item():.3f} scale "
                f"{model.logit_scale.exp().item():.1f} rate {rate:.2e} images/s {seen / spent:.0f}",
                flush=True,
            )
        if step % 150 == 0 or spent >= args.minutes * 60:
            average.module.visual.patch_dropout = torch.nn.Identity()
            average.eval()
            accuracy = zero_shot(
                average.module, tokenizer, dev_images, dev_labels, [n[0] for n in sources["cifar10"].names]
            )
            print(f"step {step} dev top-1 {100 * accuracy:.1f} %", flush=True)
            save(
                checkpoint,
                {
                    "model": model.state_dict(),
                    "average": average.state_dict(),
                    "step": step,
                    "seen": seen,
                    "spent": spent,
                    "optimizers": [o.state_dict() for o in trained],
                },
            )
            save(args.output / "open_clip.pt", average.module.state_dict())
            facts = {
                "config": CONFIG,
                "steps": step,
                "images": seen,
                "minutes": round(spent / 60, 1),
                "seed": args.seed,
                "dev_top1": accuracy,
                "logit_scale": average.module.logit_scale.exp().item(),
            }
            write_atomic(args.output / "facts.json", json.dumps(facts, indent=1).encode())
            tick = clock()


if __name__ == "__main__":
    main()
