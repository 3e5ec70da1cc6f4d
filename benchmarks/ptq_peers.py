"""W8A8 beside what others make of the same model: OpenVINO with NNCF, SmoothQuant on and off, and static ONNX Runtime.

    python -m benchmarks.ptq_peers --data DIR [--images 2000] [--calibration 300]      (needs the extra `bench`)

All calibrate on the same images and embed the same ones; text stays float in all, so that only image towers differ.
Prints, and keeps in benchmarks/results/ptq_peers.json, the error of embeddings, KL and top-1 beside float's, paired.
"""

from __future__ import annotations

import argparse
import copy
import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qclip
from qclip import data as qdata
from qclip import metrics, models
from qclip.bench.case import Encoder
from qclip.files import write_atomic
from qclip.machine import environment

OURS = ("w8a8", "w8a8-smoothquant", "w8a8-gptq", "w8a8-static", "w8a8-static-smoothquant", "w8a8-repq-vit")
BATCH = 50  # of everything that is exported with a fixed batch
PATH = Path(__file__).parent / "results" / "ptq_peers.json"
Run = Callable[[np.ndarray], np.ndarray]


def peers(model: nn.Module, calibration: np.ndarray, folder: Path) -> Iterator[tuple[str, Run]]:
    example = torch.from_numpy(calibration[:BATCH])
    tower = copy.deepcopy(model)
    models.towers(tower)
    yield from openvino(Encoder(tower, "image").eval(), example, calibration)
    yield from onnxruntime(Encoder(tower, "image").eval(), example, calibration, folder)


def openvino(tower: nn.Module, example: Tensor, calibration: np.ndarray) -> Iterator[tuple[str, Run]]:
    import nncf
    import openvino as ov

    with torch.no_grad():
        converted = ov.convert_model(tower, example_input=example)
    images = nncf.Dataset([calibration[i : i + 1] for i in range(len(calibration))])
    for name, alphas in (("on", None), ("off", nncf.AdvancedSmoothQuantParameters(matmul=-1, convolution=-1))):
        advanced = nncf.AdvancedQuantizationParameters(**({} if alphas is None else {"smooth_quant_alphas": alphas}))
        small = nncf.quantize(
            converted.clone(),
            images,
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(calibration),
            advanced_parameters=advanced,
        )
        compiled = ov.Core().compile_model(small, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
        yield f"OpenVINO + NNCF, SmoothQuant {name}", lambda x, compiled=compiled: compiled(x)[0]


def onnxruntime(tower: nn.Module, example: Tensor, calibration: np.ndarray, folder: Path) -> Iterator[tuple[str, Run]]:
    import onnxruntime as ort
    from onnxruntime.quantization import CalibrationDataReader, CalibrationMethod, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    full, ready = folder / "full.onnx", folder / "ready.onnx"
    with torch.no_grad():
        torch.onnx.export(tower, (example,), str(full), input_names=["x"], dynamo=False, opset_version=17)
    quant_pre_process(full, ready, skip_symbolic_shape=True, skip_onnx_shape=True)

    class Images(CalibrationDataReader):  # type: ignore[misc]
        def __init__(self) -> None:
            self.feeds = ({"x": calibration[i : i + BATCH]} for i in range(0, len(calibration) - BATCH + 1, BATCH))

        def get_next(self) -> dict | None:
            return next(self.feeds, None)

    for name, method in (("min-max", CalibrationMethod.MinMax), ("percentile", CalibrationMethod.Percentile)):
        path = folder / f"{name}.onnx"
        types = {"activation_type": QuantType.QUInt8, "weight_type": QuantType.QInt8}
        quantize_static(ready, path, Images(), per_channel=True, calibrate_method=method, **types)
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        yield f"ONNX Runtime static, {name}", lambda x, session=session: session.run(None, {"x": x})[0]


def ours(model: nn.Module, name: str, calibration: np.ndarray) -> Run:
    recipe = qclip.Recipe.from_dict({**qclip.recipes.get(name).to_dict(), "name": name, "towers": ["vision"]})
    encode = models.encoders(qclip.quantize(model, recipe, torch.from_numpy(calibration))).encode_image
    return lambda x: encode(torch.from_numpy(x)).numpy()


@torch.inference_mode()
def embedded(run: Run, pixels: np.ndarray) -> np.ndarray:
    found = []
    for start in range(0, len(pixels), BATCH):
        part = pixels[start : start + BATCH]
        padded = np.concatenate([part, np.repeat(part[:1], BATCH - len(part), 0)])
        found.append(np.array(run(padded), np.float64)[: len(part)])
    vectors = np.concatenate(found)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def pixels(model: Any, name: str) -> tuple[np.ndarray, qdata.ImageSet]:
    data = qdata.load(name)
    return torch.cat([x for _, x in qdata.batches(data, model.preprocess)]).numpy(), data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="folder of the Parquet files")
    parser.add_argument("--images", type=int, default=2000)
    parser.add_argument("--calibration", type=int, default=300)
    args = parser.parse_args()
    model = qclip.load_model("photos")
    calibration, _ = pixels(model, f"parquet:{args.data}/flickr8k_train_64.parquet?samples={args.calibration}")
    test, data = pixels(model, f"parquet:{args.data}/cifar10_test.parquet?samples={args.images}")
    encoders = models.encoders(model)
    with torch.inference_mode():
        prompts = encoders.encode_text(encoders.tokenizer([f"a photo of a {name}" for name in data.classes])).numpy()
    prompts = prompts / np.linalg.norm(prompts, axis=1, keepdims=True)
    labels, scale = np.asarray(data.labels), encoders.logit_scale
    reference = embedded(lambda x: encoders.encode_image(torch.from_numpy(x)).numpy(), test)
    right = (reference @ prompts.T).argmax(1) == labels
    rows = []

    def row(name: str, run: Run) -> None:
        vectors = embedded(run, test)
        cosines = (vectors * reference).sum(1)
        flips = metrics.mcnemar(right, (vectors @ prompts.T).argmax(1) == labels)
        lost = metrics.divergence(scale * reference @ prompts.T, scale * vectors @ prompts.T)
        rows.append(
            {
                "name": name,
                "one_minus_cosine": float(1 - cosines.mean()),
                "kl": float(lost.mean()),
                "top1_difference": (flips.won - flips.lost) / len(labels),
                "mcnemar_p": flips.exact_p,
            }
        )
        print(json.dumps(rows[-1]), flush=True)

    for name in OURS:
        row(name, ours(model, name, calibration))
    with tempfile.TemporaryDirectory() as folder:
        for name, run in peers(model, calibration, Path(folder)):
            row(name, run)
    about = {"cpu": environment()["cpu"], "images": len(test), "calibration": len(calibration)}
    write_atomic(PATH, f"{json.dumps({**about, 'top1': float(right.mean()), 'rows': rows}, indent=1)}\n".encode())


if __name__ == "__main__":
    main()
