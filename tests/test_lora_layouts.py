"""LoRA files as others write them: each layout gives what diffusers, or the formula, gives; what is not read is refused by name."""

from __future__ import annotations

import copy
import inspect
import json
import re
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from conftest import tiny_model
from safetensors.torch import save_file
from torch import nn

import compressor
from compressor import registry
from compressor.errors import CompressorError, UsageError
from compressor.plugins.magnitude import Magnitude
from compressor.runs.lora_file import _READERS, read_lora
from compressor.sparsity.notation import parse
from compressor.weights import float32_

peft = pytest.importorskip("peft")

HEADS = {"num_attention_heads": 2, "attention_head_dim": 16}
ROPE = {"axes_dims_rope": (4, 4, 8)}
RANK = 4


def wan():
    return diffusers.WanTransformer3DModel(
        **HEADS, num_layers=2, ffn_dim=64, text_dim=16, freq_dim=32, in_channels=4, out_channels=4
    )


def flux():
    sizes = {"in_channels": 16, "num_layers": 1, "num_single_layers": 1, "joint_attention_dim": 32}
    return diffusers.FluxTransformer2DModel(**HEADS, **ROPE, **sizes, pooled_projection_dim=16)


def qwen():
    return diffusers.QwenImageTransformer2DModel(
        **HEADS, **ROPE, num_layers=2, in_channels=16, out_channels=4, joint_attention_dim=32
    )


def sd3():
    sizes = {"sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 2, "caption_projection_dim": 32}
    return diffusers.SD3Transformer2DModel(**HEADS, **sizes, joint_attention_dim=32, pooled_projection_dim=16)


def hunyuan():
    sizes = {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 16}
    return diffusers.HunyuanVideoTransformer3DModel(
        **HEADS, **sizes, in_channels=4, out_channels=4, pooled_projection_dim=8, rope_axes_dim=(4, 4, 8)
    )


def z_image():
    sizes = {"in_channels": 4, "dim": 32, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2}
    return diffusers.ZImageTransformer2DModel(**sizes, cap_feat_dim=16, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64])


def unet():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(16, 32),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
    )


def sdxl():
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=2,
        block_out_channels=(8, 16, 16),
        norm_num_groups=8,
        cross_attention_dim=16,
        attention_head_dim=8,
        use_linear_projection=True,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    )


def made(make):
    torch.manual_seed(0)
    return make()


def randn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def pair(name, out, into, alpha=None, down="lora_down", up="lora_up"):
    alphas = {} if alpha is None else {f"{name}.alpha": torch.tensor(float(alpha))}
    return {f"{name}.{down}.weight": randn(RANK, into), f"{name}.{up}.weight": randn(out, RANK), **alphas}


def halves(name, out, into, alpha=None):
    return pair(name, out, into, alpha, "lora_A", "lora_B")


def comfy_wan(alpha=2.0):
    state = {}
    for block in range(2):
        at = f"diffusion_model.blocks.{block}"
        for layer in (f"{a}_attn.{o}" for a in ("self", "cross") for o in "qkvo"):
            state |= pair(f"{at}.{layer}", 32, 32, alpha)
        state |= pair(f"{at}.ffn.0", 64, 32, alpha) | pair(f"{at}.ffn.2", 32, 64, alpha)
    return state


def musubi_wan():
    named = {}
    for name, value in comfy_wan().items():
        layer, dot, kind = name.removeprefix("diffusion_model.").partition(".lora_")
        layer = layer.removesuffix(".alpha")
        named[f"lora_unet_{layer.replace('.', '_')}.{'lora_' + kind if dot else 'alpha'}"] = value
    return named


def biased_wan():
    zeros = {"diffusion_model.blocks.0.self_attn.norm_q.diff": torch.zeros(32)}
    return comfy_wan(None) | {"diffusion_model.blocks.1.cross_attn.k.diff_b": randn(32)} | zeros


def kohya_flux():
    at, single = "lora_unet_double_blocks_0_", "lora_unet_single_blocks_0_"
    state = pair(f"{at}img_attn_qkv", 96, 32, 2) | pair(f"{at}txt_mlp_0", 128, 32, 1)
    return state | pair(f"{single}linear2", 32, 160, 1) | pair(f"{single}modulation_lin", 96, 32, 3)


def xlabs_flux():
    at = "double_blocks.0.processor."
    return pair(f"{at}qkv_lora1", 96, 32, None, "down", "up") | pair(f"{at}proj_lora2", 32, 32, None, "down", "up")


def qwen_files():
    at = "transformer_blocks.1.attn."
    return pair(f"{at}to_q", 32, 32, 2) | pair(f"{at}to_add_out", 32, 32, 1)


def hunyuan_files():
    at = "diffusion_model.double_blocks.0."
    return halves(f"{at}img_attn_qkv", 96, 32) | halves(f"{at}txt_attn_proj", 32, 32)


def ranks_sd3():
    at = "transformer.transformer_blocks."
    first = {
        name: value[:2] if "lora_A" in name else value[:, :2]
        for name, value in halves(f"{at}0.attn.to_q", 32, 32).items()
    }
    return first | halves(f"{at}1.attn.to_k", 32, 32)


def by_diffusers(mixin, model, state):
    """The weights of `model` after a pipeline of diffusers has loaded the LoRA and fused it, and their names."""
    loader = type("Pipeline", (getattr(diffusers.loaders, mixin),), {"components": {}, "hf_device_map": None})
    pipeline = loader.__new__(loader)
    pipeline.transformer, pipeline.text_encoder, pipeline.text_encoder_2 = copy.deepcopy(model), None, None
    pipeline.load_lora_weights(dict(state))
    pipeline.transformer.fuse_lora()
    layers = [
        (n, m.base_layer) for n, m in pipeline.transformer.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)
    ]
    return {f"{n}.{kind}": value.detach() for n, layer in layers for kind, value in layer.named_parameters()}


def read(state, model, folder, metadata=None, name="own.safetensors"):
    save_file({name: value.clone() for name, value in state.items()}, folder / name, metadata=metadata)
    return read_lora(folder / name, model)


def added(changes, model):
    """The tensors of `model` with the changes, by name."""
    weights = {name: float32_(copy.deepcopy(model)).get_parameter(name).detach() for name in changes}
    return {name: weights[name] + change.made(weights[name].shape) for name, change in changes.items()}


@pytest.mark.parametrize(
    ("make", "mixin", "file"),
    [
        (wan, "Wan", comfy_wan),
        (wan, "Wan", musubi_wan),
        (wan, "Wan", biased_wan),
        (wan, "Wan", lambda: {n: v.to(torch.float8_e4m3fn) for n, v in comfy_wan(None).items()}),
        (wan, "Wan", lambda: {n: v.bfloat16() for n, v in comfy_wan().items()}),
        (wan, "Wan", lambda: comfy_wan(0.0)),
        (flux, "Flux", kohya_flux),
        (flux, "Flux", xlabs_flux),
        (qwen, "QwenImage", qwen_files),
        (hunyuan, "HunyuanVideo", hunyuan_files),
    ],
)
def test_a_layout_gives_what_diffusers_gives(make, mixin, file, tmp_path):
    model, state = made(make), file()
    changes, left_out = read(state, model, tmp_path)
    expected, own = by_diffusers(f"{mixin}LoraLoaderMixin", model, state), dict(model.named_parameters())
    found = added(changes, model)
    assert found and found.keys() <= expected.keys() and not left_out
    for name, value in expected.items():
        torch.testing.assert_close(found.get(name, own[name].detach()), value, rtol=0, atol=1e-5)


def kohya_flux_end():
    at = "lora_unet_final_layer_"  # diffusers 0.37 asks for both
    return kohya_flux() | pair(f"{at}adaLN_modulation_1", 64, 32) | pair(f"{at}linear", 16, 32)


def hunyuan_end():
    return hunyuan_files() | halves("diffusion_model.final_layer.adaLN_modulation.1", 64, 32)


HALVES = {flux: ("lora_down.weight", "lora_up.weight"), hunyuan: ("lora_A.weight", "lora_B.weight")}


@pytest.mark.parametrize(("make", "file"), [(flux, kohya_flux_end), (hunyuan, hunyuan_end)])
def test_the_halves_of_the_last_norm_are_swapped_as_outputs_alone(make, file, tmp_path):
    """Of HunyuanVideo diffusers swaps the ranks of the first matrix, too, and so takes each for another."""
    model, state = made(make), file()
    changes, _ = read(state, model, tmp_path)
    into, out = (next(v for n, v in state.items() if "final_layer" in n and n.endswith(half)) for half in HALVES[make])
    shift, scale = (out.float() @ into.float()).chunk(2)
    wanted = torch.cat([scale, shift])
    torch.testing.assert_close(changes["norm_out.linear.weight"].made(wanted.shape), wanted)


def test_layers_of_unlike_ranks_without_alphas_add_their_products(tmp_path):
    """diffusers 0.37 gives all layers the strength of one."""
    state, model = ranks_sd3(), made(sd3)
    changes, _ = read(state, model, tmp_path)
    names = [name.removeprefix("transformer.").removesuffix(".lora_A.weight") for name in state if "lora_A" in name]
    assert changes.keys() == {f"{name}.weight" for name in names} and len(names) == 2
    for name in names:
        into, out = (state[f"transformer.{name}.lora_{half}.weight"] for half in "AB")
        torch.testing.assert_close(changes[f"{name}.weight"].made(torch.Size((32, 32))), out @ into)


def kohya_unet(model, alpha):
    """A LoCon of kohya's programs for every layer, with the alphas that `alpha` gives by number; and the products by name."""
    state, products = {}, {}
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Conv2d)) and "blocks." in n]
    for number, (name, module) in enumerate(layers):
        weight, base = module.weight, f"lora_unet_{name.replace('.', '_')}"
        into, out = randn(RANK, *weight.shape[1:]), randn(len(weight), RANK, *[1] * (weight.dim() - 2))
        state |= {f"{base}.lora_down.weight": into, f"{base}.lora_up.weight": out}
        if (own := alpha(number)) is not None:
            state[f"{base}.alpha"] = torch.tensor(own)
        product = (out.flatten(1) @ into.flatten(1)).view(weight.shape)
        products[f"{name}.weight"] = product * (1.0 if own is None else own / RANK)
    return state, products


@pytest.mark.parametrize("alpha", [lambda i: 1.0 + i % 3, lambda i: 2.0 if i % 2 else None, lambda i: None])
def test_alphas_of_kohya_belong_to_their_own_layers(alpha, tmp_path):
    """diffusers 0.42.1 gives layers of attention the commonest alpha of the file."""
    model = made(unet)
    state, products = kohya_unet(model, alpha)
    state |= pair("lora_te_text_model_encoder_layers_0_self_attn_q_proj", 8, 8, 1)
    changes, left_out = read(state, model, tmp_path)
    assert changes.keys() == products.keys() and left_out == {"text_encoder": 2}
    for name, product in products.items():
        torch.testing.assert_close(changes[name].made(product.shape), product)


def test_names_of_stability_find_the_layers_of_diffusers(tmp_path):
    """As kohya's programs name the layers of SDXL."""
    model = made(sdxl)
    names = {
        "input_blocks_4_1_transformer_blocks_0_attn1_to_q": "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        "input_blocks_5_0_in_layers_2": "down_blocks.1.resnets.1.conv1",
        "input_blocks_3_0_op": "down_blocks.0.downsamplers.0.conv",
        "middle_block_1_proj_in": "mid_block.attentions.0.proj_in",
        "output_blocks_2_1_transformer_blocks_0_ff_net_0_proj": "up_blocks.0.attentions.2.transformer_blocks.0.ff.net.0.proj",
    }
    state, products = {}, {}
    for alpha, (given, name) in enumerate(names.items(), 1):
        weight = model.get_submodule(name).weight
        into, out = randn(RANK, *weight.shape[1:]), randn(len(weight), RANK, *[1] * (weight.dim() - 2))
        state |= {f"lora_unet_{given}.lora_down.weight": into, f"lora_unet_{given}.lora_up.weight": out}
        state[f"lora_unet_{given}.alpha"] = torch.tensor(float(alpha))
        products[f"{name}.weight"] = (out.flatten(1) @ into.flatten(1)).view(weight.shape) * alpha / RANK
    changes, _ = read(state, model, tmp_path)
    assert changes.keys() == products.keys()
    for name, product in products.items():
        torch.testing.assert_close(changes[name].made(product.shape), product)


def test_other_layouts_need_transformers_and_own_names_do_not(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert read(ranks_sd3(), made(sd3), tmp_path)[0]
    with pytest.raises(CompressorError, match=r"without transformers[\s\S]*\[lora\]"):
        read(comfy_wan(), made(wan), tmp_path)


# --- What peft writes. ---


def peft_lora(model, folder, **options):
    """`model` with a LoRA of peft, which is saved in `folder`."""
    config = peft.LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": ["to_q", "to_k"], **options})
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    for name, value in wrapped.named_parameters():
        if "lora_" in name:
            value.data.copy_(randn(*value.shape))
    wrapped.save_pretrained(folder)
    return wrapped


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"to_q": 2}, "alpha_pattern": {"transformer_blocks.0.attn.to_k": 3}},
        pytest.param({"lora_bias": True}, marks=pytest.mark.filterwarnings("ignore:.*invalid shape")),
        {"init_lora_weights": "gaussian"},
    ],
)
def test_a_folder_of_peft_is_merged_as_peft_merges_it(options, tmp_path):
    model = made(sd3)
    expected = dict(peft_lora(model, tmp_path, **options).merge_and_unload().named_parameters())
    for path in (tmp_path, tmp_path / "adapter_model.safetensors"):
        found = added(read_lora(path, model)[0], model)
        assert len(found) == (8 if "lora_bias" in options else 4)
        for name, value in found.items():
            torch.testing.assert_close(value, expected[name].detach())


def test_a_model_that_is_not_of_diffusers_takes_a_lora_of_peft(tmp_path):
    model = tiny_model()
    expected = dict(peft_lora(model, tmp_path, target_modules=["0", "2"]).merge_and_unload().named_parameters())
    for name, value in added(read_lora(tmp_path, model)[0], model).items():
        torch.testing.assert_close(value, expected[name].detach())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"use_dora": True}, "use_dora=True"),
        ({"init_lora_weights": "pissa_niter_4"}, "pissa_niter_4: it moved the model's own weights"),
        ({"peft_type": "LOHA"}, "peft_type=LOHA"),
        ({"r": 8}, "has rank 4, its configuration says 8"),
        ({"lora_alpha": "much"}, "has no finite alpha"),
        ({"alpha_pattern": {"(a+)+": 1}}, "the pattern .* of its configuration"),
    ],
)
def test_a_configuration_that_means_more_is_refused(change, said, tmp_path):
    model = made(sd3)
    peft_lora(model, tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(UsageError, match=said):
        read_lora(tmp_path, model)


# --- What is not read. ---

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
COMFY_Q = "diffusion_model.blocks.0.self_attn."


KOHYA = "lora_unet_"


@pytest.mark.parametrize(
    ("make", "file", "said"),
    [
        (sd3, lambda: ranks_sd3() | {f"{TO_Q}.dora_scale": randn(32, 1)}, r"to_q\.dora_scale \(DoRA\)"),
        (unet, lambda: kohya_unet(unet(), lambda i: 1.0)[0] | {f"{KOHYA}mid_block_resnets_0_conv1.dora_scale": randn(32, 1)}, "DoRA"),
        (flux, lambda: kohya_flux() | {"lora_unet_double_blocks_0_img_attn_qkv.dora_scale": randn(96, 1)}, "DoRA"),
        (
            flux,
            lambda: kohya_flux() | pair(f"{KOHYA}final_layer_linear", 16, 32, 1),
            r"(leaves out |cannot read it: ')lora_unet_final_\S+\.(alpha|lora_down)",  # the latter: diffusers 0.37
        ),
        (wan, lambda: comfy_wan(None) | {f"{COMFY_Q}norm_q.diff": randn(32)}, r"norm_q\.diff \(a whole difference\)"),
        (z_image, lambda: halves("diffusion_model.layers.0.attention.qkv", 96, 32), r"(no layer|read it:) 'layers\.0\.\w+\.qkv"),
        (unet, lambda: {"lora_unet_mid_block_resnets_0_conv1.hada_w1_a": randn(4, 4)}, "LoHa"),
        (unet, lambda: {"lora_unet_mid_block_resnets_0_conv1.lokr_w1": randn(4, 4)}, "LoKr"),
        (sd3, lambda: ranks_sd3() | halves("foo.bar", 4, 4), "no layer 'foo.bar'"),
        (sd3, lambda: ranks_sd3() | {f"{TO_Q}.other.alpha": torch.tensor(1.0)}, "alpha is of no layer of the file"),
        (sd3, lambda: ranks_sd3() | {f"{TO_Q}.alpha": torch.ones(2)}, r"to_q\.alpha is \(2,\)"),
        (sd3, lambda: ranks_sd3() | {f"{TO_Q}.alpha": torch.tensor(float("nan"))}, "NaN or infinity"),
        (sd3, lambda: {n: v.to(torch.int8) for n, v in ranks_sd3().items()}, "torch.int8"),
        (sd3, lambda: halves("transformer.pos_embed.proj", 32, 4), r"pos_embed\.proj\.lora_A\.weight is \(4, 4\)"),
        (sd3, lambda: halves(f"{TO_Q}", 32, 32) | {f"{TO_Q}.lora_A.b.weight": randn(4, 32)}, "a second adapter"),
        (sd3, lambda: halves(f"{TO_Q}", 32, 32) | halves(TO_Q.replace("transformer.", "unet.", 1), 32, 32), "there twice"),
    ],
)  # fmt: skip
def test_what_is_not_read_is_refused_by_name(make, file, said, tmp_path):
    with pytest.raises(CompressorError, match=said):
        read(file(), made(make), tmp_path)


def test_the_readers_are_those_of_the_pipelines_of_diffusers():
    folder = Path(inspect.getfile(diffusers)).parent / "pipelines"
    asked = {}
    for text in (path.read_text() for path in folder.rglob("*.py")):
        for bases, body in re.findall(r"^class \w+\(([^)]*)\):(.*?)(?=^class |\Z)", text, re.M | re.S):
            mixins = re.findall(r"(\w+)LoraLoaderMixin", bases)
            for model in re.findall(r"^        (?:transformer|unet): (\w+)", body, re.M) if mixins else ():
                asked.setdefault(re.sub(r"Transformer[123]DModel$", "", model), set()).add(mixins[0])
    asked = {model: {name.replace("DiffusionXL", "Diffusion") for name in names} for model, names in asked.items()}
    for other in ("UNetControlNetXSModel", "RFD4ProteinaTransformer"):  # no denoisers of pictures
        asked.pop(other, None)
    assert {model: {_READERS.get(model, model)} for model in asked} == asked and len(asked) > 20


# --- Sparse models. ---


@pytest.mark.parametrize("pattern", ["2:4", "1:4", "2:2:4", "4c:2:4", "venom:8:2:8", "unstructured:0.3", "8:2:4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_every_zero_stays_in_each_pattern_however_often_and_strong(pattern, dtype, tmp_path):
    model = made(sd3).to(dtype)
    model.save_pretrained(tmp_path / "source")
    adapter = registry.adapter("diffusers").opened(str(tmp_path / "source"))
    method = Magnitude(pattern=parse(pattern))
    data = torch.zeros(2, 4, 8, 8)
    result = compressor.prune(
        adapter.load(str(tmp_path / "source")), method, adapter=adapter, data=data, steps=0, device="cpu"
    )
    compressor.save(tmp_path / "run", result.model, result.masks, "diffusers", architecture=adapter.architecture)
    save_file(halves(TO_Q, 32, 32), tmp_path / "own.safetensors")
    weight = TO_Q.removeprefix("transformer.") + ".weight"
    before = result.model.get_parameter(weight).detach()
    for step, scale in enumerate((0.0, -0.5, 2.0)):
        last = tmp_path / "run" if step == 0 else tmp_path / str(step - 1)
        compressor.merge_lora(last, tmp_path / "own.safetensors", tmp_path / str(step), scale)
        found = compressor.load(tmp_path / str(step)).get_parameter(weight)
        assert found.dtype == dtype and torch.equal(found != 0, before != 0)
        change = randn(32, 4) @ randn(4, 32) * (before != 0)
        torch.testing.assert_close(found.detach(), (before.float() + scale * change).to(dtype))
        before = found.detach()
