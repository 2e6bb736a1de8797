"""Not a script; other engines for the same float model. Each builder returns a function that runs one fixed batch.

Integer engines get what their own tools make of the float model: onnxruntime static QDQ (per channel, unsigned
activations, signed weights), OpenVINO through nncf.quantize with its default preset. They all see the same images for
calibration.

Tried and left out: MNN 3.6.1's quantizer and OpenVINO 2026.4's compiler of 2-bit constants abort the process on these
networks; ncnn's package has no tool that makes an int8 model.

Engines that read a file get the model's one export in `folder`, and have read it when they are built: a folder is for
one model and one shape of images, and can go when the last engine is built.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

Run = Callable[[], Any]
Builder = Callable[[nn.Module, Tensor, Path], Run]


def torch_fp32(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return lambda: model(x)


def torch_bf16(model: nn.Module, x: Tensor, folder: Path) -> Run:
    """The model itself in bf16 (autocast would convert the weights at every call); images arrive as float32."""
    half = copy.deepcopy(model).to(torch.bfloat16)
    return lambda: half(x.to(torch.bfloat16))


def torch_fp32_compiled(model: nn.Module, x: Tensor, folder: Path) -> Run:
    torch._inductor.config.freezing = True
    return torch_fp32(torch.compile(model), x, folder)


def torch_bf16_compiled(model: nn.Module, x: Tensor, folder: Path) -> Run:
    torch._inductor.config.freezing = True
    compiled = torch.compile(copy.deepcopy(model).to(torch.bfloat16))
    return lambda: compiled(x.to(torch.bfloat16))


def to_onnx(model: nn.Module, x: Tensor, folder: Path) -> str:
    """The model as an ONNX file for batches of x's shape, unless it is in `folder` already; returns its path."""
    path = folder / "model.onnx"
    if not path.exists():
        # Plain tensors in, so that layers of 4-d images stay NCHW whatever the memory format of x.
        program = torch.onnx.export(model, (x.contiguous(),), dynamo=True, opset_version=18, verbose=False)
        program.save(str(path))
    return str(path)


def _ort_session(path: str, x: Tensor, entries: dict[str, str] | None = None) -> Run:
    import onnxruntime as ort

    options = ort.SessionOptions()
    for key, value in (entries or {}).items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads, options.inter_op_num_threads = torch.get_num_threads(), 1
    options.log_severity_level = 3
    session = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    feed = {session.get_inputs()[0].name: x.contiguous().numpy()}
    return lambda: session.run(None, feed)


def ort_fp32(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _ort_session(to_onnx(model, x, folder), x)


class _Reader:
    def __init__(self, name: str, batches: list[np.ndarray]) -> None:
        self.items = iter([{name: b} for b in batches])

    def get_next(self) -> Any:
        return next(self.items, None)


def calibration(x: Tensor) -> list[np.ndarray]:
    generator = torch.Generator().manual_seed(1)
    return [torch.rand(x.shape, generator=generator).numpy() for _ in range(max(1, 16 // len(x)))]


def ort_int8(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    path = to_onnx(model, x, folder)
    ready, out = path.replace(".onnx", ".ready.onnx"), path.replace(".onnx", ".int8.onnx")
    quant_pre_process(path, ready, skip_symbolic_shape=True)
    import onnx

    name = onnx.load(ready, load_external_data=False).graph.input[0].name
    CalibrationDataReader.register(_Reader)
    quantize_static(ready, out, _Reader(name, calibration(x)), quant_format=QuantFormat.QDQ, per_channel=True,
                    activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8)  # fmt: skip
    return _ort_session(out, x)


def ort_int8_dynamic(model: nn.Module, x: Tensor, folder: Path) -> Run:
    from onnxruntime.quantization import QuantType, quantize_dynamic

    path = to_onnx(model, x, folder)
    out = path.replace(".onnx", ".dynamic.onnx")
    quantize_dynamic(path, out, per_channel=True, weight_type=QuantType.QInt8)
    return _ort_session(out, x)


def _openvino(model: Any, x: Tensor, **config: Any) -> Run:
    import openvino as ov

    settings = {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "PERFORMANCE_HINT": "LATENCY", **config}
    compiled = ov.Core().compile_model(model, "CPU", settings)
    request, data = compiled.create_infer_request(), x.contiguous().numpy()
    return lambda: request.infer([data], share_inputs=True)


def _to_openvino(model: nn.Module, x: Tensor, folder: Path) -> Any:
    import openvino as ov

    return ov.Core().read_model(to_onnx(model, x, folder))


def openvino_fp32(model: nn.Module, x: Tensor, folder: Path) -> Run:
    return _openvino(_to_openvino(model, x, folder), x, INFERENCE_PRECISION_HINT="f32")


def openvino_default(model: nn.Module, x: Tensor, folder: Path) -> Run:
    """Its default: bf16 where the processor has it."""
    return _openvino(_to_openvino(model, x, folder), x)


def openvino_int8(model: nn.Module, x: Tensor, folder: Path) -> Run:
    os.environ.setdefault("TQDM_DISABLE", "1")
    import nncf

    kind = {"model_type": nncf.ModelType.TRANSFORMER} if "ViT" in type(model).__name__ else {}
    data = nncf.Dataset(calibration(x))
    return _openvino(nncf.quantize(_to_openvino(model, x, folder), data, subset_size=16, **kind), x)


def ort_2bit(model: nn.Module, x: Tensor, folder: Path) -> Run:
    """Only for chains of linear layers and ReLUs: MatMulNBits, 2-bit weights and int8 activations, blocks of 128."""
    return _ort_session(_two_bit(model, x, folder), x)


def ort_2bit_lut(model: nn.Module, x: Tensor, folder: Path) -> Run:
    """The same by table look-up (T-MAC)."""
    return _ort_session(_two_bit(model, x, folder), x, {"mlas.use_lut_gemm": "1"})


def _two_bit(model: nn.Module, x: Tensor, folder: Path) -> str:
    from onnx import TensorProto, helper, numpy_helper, save

    nodes, initializers, value = [], [], "x"
    for i, layer in enumerate(model):
        out = f"v{i}"
        if isinstance(layer, nn.ReLU):
            nodes.append(helper.make_node("Relu", [value], [out]))
        else:
            n, k, block = layer.out_features, layer.in_features, 128
            packed = np.random.default_rng(i).integers(0, 256, (n, k // block, block // 4), dtype=np.uint8)
            initializers += [
                numpy_helper.from_array(packed, f"w{i}"),
                numpy_helper.from_array(np.full((n, k // block), 0.01, np.float32), f"s{i}"),
            ]
            nodes.append(helper.make_node("MatMulNBits", [value, f"w{i}", f"s{i}"], [out], domain="com.microsoft",
                                          K=k, N=n, bits=2,
                                          block_size=block, accuracy_level=4))  # fmt: skip
        value = out
    shape = [len(x), next(m.out_features for m in reversed(list(model)) if isinstance(m, nn.Linear))]
    graph = helper.make_graph(nodes, "linear", [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))],
                              [helper.make_tensor_value_info(value, TensorProto.FLOAT, shape)],
                              initializers)  # fmt: skip
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    path = str(folder / "two_bit.onnx")
    save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def litespark(model: nn.Module, x: Tensor, folder: Path) -> Run:
    """Only for chains of linear layers and ReLUs: ternary weights at 2 bits, int8 activations, one scale a tensor."""
    from litespark_inference.torchless import kernel
    from litespark_inference.torchless.pack import pack_ternary_4_per_byte

    random, images = np.random.default_rng(0), x.contiguous().numpy()
    weights = [
        pack_ternary_4_per_byte(random.integers(-1, 2, tuple(layer.weight.shape), dtype=np.int8))
        for layer in model if isinstance(layer, nn.Linear)
    ]  # fmt: skip

    def run() -> np.ndarray:
        values = images
        for i, packed in enumerate(weights):
            values = np.maximum(values, 0, out=values) if i else values
            codes, scales = np.empty(values.shape, np.int8), np.empty(len(values), np.float32)
            if len(values) == 1:
                scale = kernel.quantize_activation(values[0], codes[0])
                values = kernel.matmul_packed_m1(codes[0], packed, 0.01, scale)[None]
            else:
                kernel.quantize_activation_batched(values, codes, scales)
                values = kernel.matmul_packed_mT(codes, scales, packed, 0.01)
        return values

    return run


FLOAT = (torch_fp32, torch_bf16, torch_fp32_compiled, torch_bf16_compiled, ort_fp32, openvino_fp32, openvino_default)
INT8 = (ort_int8, ort_int8_dynamic, openvino_int8)
TWO_BIT = (ort_2bit, ort_2bit_lut, litespark)
PACKAGES = ("onnxruntime", "openvino", "nncf", "litespark-inference")
