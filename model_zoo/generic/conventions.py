"""What the pipelines of diffusers tell each class of model: the time, the sign of the answer, and the form of the arguments.

Every pipeline calls its denoiser in a way of its own, and a model that is told another time than it was trained with gives no
error, only bad pictures. So what is not in this table is not guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from torch import Tensor

from compressor.errors import UsageError

HOW_TO_RECORD = "Record the calls of its pipeline: compressor record PIPELINE --prompts FILE"
"""What works for every class: nothing need be known of it."""


@dataclass(frozen=True)
class Convention:
    """How a class is called.

    Its time is `offset + scale t`, with t the timestep that the scheduler gives (1000 sigma in rectified flow). `process`: the
    one that every published model of the class was trained with, or `any`: the scheduler says it. `negated`: the answer is the
    negative of what the scheduler takes. `noisy`, `time`: the names of those arguments. `scale_setting`: a setting of the
    model that multiplies the time. `shared`: arguments without a dim for the batch. `listed`: arguments that are lists of one
    tensor per sample, like the answer; the noisy one of images has a dim of one frame. `sizes`: arguments of whole numbers,
    nested in lists. `whole`: whether whole timesteps stay so, or become numbers like those of the images. `unless`: settings
    (`name`, or `name=value`) that make it another kind of model. `source`: the line in diffusers 0.42.1.
    """

    source: str
    process: Literal["flow", "any"] = "any"
    scale: float = 1.0
    offset: float = 0.0
    negated: bool = False
    noisy: str = "hidden_states"
    time: str = "timestep"
    scale_setting: str | None = None
    shared: tuple[str, ...] = ()
    listed: tuple[str, ...] = ()
    sizes: tuple[str, ...] = ()
    whole: bool = True
    unless: tuple[str, ...] = ()

    def told(self, timestep: Tensor, config: Mapping[str, Any]) -> Tensor:
        """What the model of `config` is told for the scheduler's `timestep` (n,)."""
        if self.scale == 1 and self.offset == 0 and self.scale_setting is None:
            return timestep if self.whole else timestep.float()
        factor = float(config.get(self.scale_setting, 1.0)) if self.scale_setting is not None else 1.0
        return self.offset + self.scale * factor * timestep


_IDS = ("img_ids", "txt_ids")
_ROTARY = ("image_rotary_emb",)

CONVENTIONS: Mapping[str, Convention] = MappingProxyType(
    {
        "UNet2DModel": Convention("pipelines/ddpm/pipeline_ddpm.py:125", noisy="sample"),
        "UNet2DConditionModel": Convention(
            "pipelines/stable_diffusion/pipeline_stable_diffusion.py:1042, "
            "pipelines/stable_diffusion_xl/pipeline_stable_diffusion_xl.py:1214",
            noisy="sample",
            unless=("time_embedding_type=fourier", "time_cond_proj_dim"),  # the latent upscaler's; distilled ones (LCM)
        ),
        "DiTTransformer2DModel": Convention("pipelines/dit/pipeline_dit.py:202"),
        "PixArtTransformer2DModel": Convention("pipelines/pixart_alpha/pipeline_pixart_alpha.py:932"),
        "HunyuanDiT2DModel": Convention("pipelines/hunyuandit/pipeline_hunyuandit.py:840", shared=_ROTARY, whole=False),
        "CogVideoXTransformer3DModel": Convention("pipelines/cogvideo/pipeline_cogvideox.py:731", shared=_ROTARY),
        "SD3Transformer2DModel": Convention(
            "pipelines/stable_diffusion_3/pipeline_stable_diffusion_3.py:1074", process="flow"
        ),
        "WanTransformer3DModel": Convention("pipelines/wan/pipeline_wan.py:613", process="flow"),
        "SanaTransformer2DModel": Convention(
            "pipelines/sana/pipeline_sana.py:914",
            process="flow",
            scale_setting="timestep_scale",
            unless=("guidance_embeds",),  # Sana-Sprint's, of a process of its own
        ),
        "FluxTransformer2DModel": Convention(
            "pipelines/flux/pipeline_flux.py:903", process="flow", scale=1e-3, shared=_IDS
        ),
        "ChromaTransformer2DModel": Convention(
            "pipelines/chroma/pipeline_chroma.py:860", process="flow", scale=1e-3, shared=_IDS
        ),
        "QwenImageTransformer2DModel": Convention(
            "pipelines/qwenimage/pipeline_qwenimage.py:647",
            process="flow",
            scale=1e-3,
            sizes=("img_shapes",),
            unless=("zero_cond_t", "use_additional_t_cond"),  # of editing and of layers: they are told more than a time
        ),
        "AuraFlowTransformer2DModel": Convention(
            "pipelines/aura_flow/pipeline_aura_flow.py:622", process="flow", scale=1e-3
        ),
        "Lumina2Transformer2DModel": Convention(
            "pipelines/lumina2/pipeline_lumina2.py:673 and 707", process="flow", scale=-1e-3, offset=1.0, negated=True
        ),
        "ZImageTransformer2DModel": Convention(
            "pipelines/z_image/pipeline_z_image.py:511 and 568",
            process="flow",
            scale=-1e-3,
            offset=1.0,
            negated=True,
            noisy="x",
            time="t",
            listed=("x", "cap_feats"),
        ),
    }
)


def convention(config: Mapping[str, Any]) -> Convention:
    """The convention of a model of `config`. Raises UsageError where it is not known."""
    name = str(config.get("_class_name"))
    found = CONVENTIONS.get(name)
    if found is None:
        raise UsageError(f"what time {name} is told, and what it answers, is not known here", HOW_TO_RECORD)
    if others := [setting for setting in found.unless if _is_set(config, setting)]:
        raise UsageError(f"what time a {name} with {others[0]} is told is not known here", HOW_TO_RECORD)
    return found


def _is_set(config: Mapping[str, Any], setting: str) -> bool:
    name, _, value = setting.partition("=")
    return str(config.get(name)) == value if value else bool(config.get(name))
