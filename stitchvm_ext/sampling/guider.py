"""Value guidance in modular pipelines, as a diffusers guider. Importing this module imports diffusers."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from diffusers.configuration_utils import register_to_config
from diffusers.guiders import ClassifierFreeGuidance
from diffusers.guiders.guider_utils import GuiderOutput
from diffusers.hooks import HookRegistry, ModelHook
from torch import Tensor, nn

from ..backbones import Condition, Encoding
from ..backbones.base import frozen
from ..value import ValueEstimator
from .checks import as_prompts, check_guidance_scale
from .guidance import Guidance, check_finite
from .hook import is_guided

HOOK_NAME = "stitchvm_value_guider"


class ValueGuidance(ClassifierFreeGuidance):
    """Classifier-free guidance whose prediction loses ``c_t grad V`` (METHOD.md §5), for modular pipelines::

        pipe.update_components(guider=ValueGuidance(value=value, prompts=[prompt], guidance_scale=4.5))
        pipe(prompt=[prompt], negative_prompt="", output="images")

    With the pipeline's Euler scheduler this is :func:`guided_sample` with ``transition="ode"``. A branch of the
    denoiser that reads the value's text serves the value too: the unconditional one with ``negative_prompt=""``, the
    conditional one for a prompt-conditioned value. The pipeline's first step is step 0 of ``window``, where img2img
    starts late too.

    Configurations hold the numbers: ``value`` and ``prompts`` are arguments of ``from_pretrained`` and ``from_config``
    again, or attributes to set afterwards. A schedule has to be a name to be saved.

    Args:
        value: an estimator on the pipeline's transformer.
        prompts: the texts that the pipeline will be called with, which the reward scores against.
            ``num_images_per_prompt`` is read off the batch.
        guidance_scale, guidance_rescale, use_original_formulation, start, stop, enabled: of
            ``diffusers.ClassifierFreeGuidance``; they govern that guidance alone.
        strength, mode, schedule, window, every: see :class:`~stitchvm_ext.sampling.Guidance`. The relative strength is
            measured against the velocity that the pipeline would have stepped with.

    Attributes:
        values: (sigma, V float32 [B]) of the guided steps of the latest trajectory.

    Raises:
        TypeError, ValueError: bad input. A pipeline's call that does not fit raises from within.
    """

    ignore_for_config = ["value", "prompts"]

    @register_to_config
    def __init__(
        self,
        *,
        value: ValueEstimator | None = None,
        prompts: str | list[str] | None = None,
        guidance_scale: float = 7.5,
        guidance_rescale: float = 0.0,
        use_original_formulation: bool = False,
        start: float = 0.0,
        stop: float = 1.0,
        enabled: bool = True,
        strength: float = Guidance.strength,
        mode: str = Guidance.mode,
        schedule: str | Callable[[float], float] = Guidance.schedule,
        window: tuple[int, int | None] = Guidance.window,
        every: int = Guidance.every,
    ):
        check_guidance_scale(guidance_scale)
        super().__init__(
            guidance_scale=guidance_scale,
            guidance_rescale=guidance_rescale,
            use_original_formulation=use_original_formulation,
            start=start,
            stop=stop,
            enabled=enabled,
        )
        self.guidance = Guidance(strength, mode, schedule, tuple(window) if isinstance(window, list) else window, every)
        self.value, self.prompts = value, prompts
        self.values: list[tuple[float, Tensor]] = []
        self._branches: list[tuple[Tensor, float, Encoding]] = []
        self._found: tuple[Tensor, Tensor] | None = None  # V and its gradient, where a branch yielded them
        self._inside = False  # the estimator calls the same transformer

    @property
    def value(self) -> ValueEstimator | None:
        return self._value

    @value.setter
    def value(self, value: ValueEstimator | None) -> None:
        if value is not None and not isinstance(value, ValueEstimator):
            raise TypeError(f"value: expected a ValueEstimator, got {type(value).__name__}")
        self._value = value

    @property
    def prompts(self) -> list[str] | None:
        return self._prompts

    @prompts.setter
    def prompts(self, prompts: str | list[str] | None) -> None:
        self._prompts = None if prompts is None else as_prompts("prompts", prompts)

    # -- configurations ------------------------------------------------------------------------------------------------

    @classmethod
    def from_config(cls, config=None, return_unused_kwargs: bool = False, *, value=None, prompts=None, **kwargs):
        made = super().from_config(config, return_unused_kwargs, **kwargs)
        guider = made[0] if return_unused_kwargs else made
        guider.value, guider.prompts = value, prompts
        return made

    def new(self, **kwargs) -> ValueGuidance:
        return super().new(**{"value": self.value, "prompts": self.prompts, **kwargs})

    # -- what diffusers calls ------------------------------------------------------------------------------------------

    def set_state(self, step: int, num_inference_steps: int, timestep: Tensor) -> None:
        super().set_state(step, num_inference_steps, timestep)
        if step == 0:
            self.values = []
        self._branches, self._found = [], None

    def prepare_models(self, denoiser: nn.Module) -> None:
        super().prepare_models(denoiser)
        if self.guidance.strength == 0:
            return
        for name in ("value", "prompts"):
            if getattr(self, name) is None:
                raise ValueError(f"{name}: expected it to be set, got None; configurations do not hold it")
        if self.value.backbone.denoiser is not denoiser:
            raise ValueError("value: expected an estimator on this very transformer, got one on another")
        if is_guided(denoiser):
            raise ValueError(
                "transformer: it is guided by apply_value_guidance too; call remove_value_guidance(transformer) first"
            )
        hook = _BranchHook(self._run_branch)
        HookRegistry.check_if_exists_or_initialize(denoiser).register_hook(hook, HOOK_NAME)

    def cleanup_models(self, denoiser: nn.Module) -> None:
        super().cleanup_models(denoiser)
        registry = getattr(denoiser, "_diffusers_hook", None)
        if registry is not None and registry.get_hook(HOOK_NAME) is not None:
            registry.remove_hook(HOOK_NAME, recurse=False)

    def forward(self, pred_cond: Tensor, pred_uncond: Tensor | None = None) -> GuiderOutput:
        output = super().forward(pred_cond, pred_uncond)
        if not self._branches:  # not a guided step
            return output
        latents, sigma, _ = self._branches[0]
        backbone = self.value.backbone
        value, grad = self._found or self._separately(latents, sigma)
        velocity = backbone.unpack(output.pred, latents)
        check_finite(self._step, sigma, velocity=velocity, value=value, gradient=grad)
        self.values.append((sigma, value))
        term = backbone.pack(self.guidance.term(velocity, grad, sigma))
        pred = (output.pred.float() - term).to(output.pred.dtype)
        return GuiderOutput(pred=pred, pred_cond=pred_cond, pred_uncond=pred_uncond)

    # -- one branch ----------------------------------------------------------------------------------------------------

    def _run_branch(self, forward: Callable, *args, **kwargs):
        """Stands in for the transformer's forward: the same output. Notes what it was called with, and the value where
        this branch's prefix serves it.
        """
        if self._inside:
            return forward(*args, **kwargs)
        self._inside = True
        try:
            call = inspect.signature(forward).bind(*args, **kwargs).arguments
            backbone = self.value.backbone
            latents, sigma, encoding, plain = backbone.read_inputs(call)
            if not self.guidance.is_active(self._step, sigma):
                return forward(*args, **kwargs)
            self._check_branch(latents, encoding)
            self._branches.append((latents, sigma, encoding))
            condition = self._own_condition(encoding, len(latents))
            with frozen(backbone.denoiser), backbone.fused():  # both branches on the same blocks, see shared_branches
                if not plain or condition is None or not self.value.can_share(condition):
                    return forward(*args, **kwargs)
                cond, uncond, *self._found = self.value.shared_branches(latents, sigma, condition)
            return _as_output(backbone.pack(cond if uncond is None else uncond), call.get("return_dict", True))
        except BaseException:  # the pipeline cleans up after branches that return
            self.cleanup_models(self.value.backbone.denoiser)
            raise
        finally:
            self._inside = False

    def _check_branch(self, latents: Tensor, encoding: Encoding) -> None:
        if len(latents) % len(self.prompts):
            raise ValueError(f"prompts: expected {len(self.prompts)} samples or a multiple of it, got {len(latents)}")
        if self._branches and all(encoding[name] is text for name, text in self._branches[0][2].items()):
            raise ValueError(
                'negative_prompt: expected a text, "" for the empty one; without it this pipeline runs its conditional '
                "branch twice"
            )

    def _texts(self, batch: int) -> tuple[str, ...]:
        return tuple(p for p in self.prompts for _ in range(batch // len(self.prompts)))

    @property
    def _scale(self) -> float:
        """s of ``u + s (c - u)``."""
        return float(self.guidance_scale + self.use_original_formulation)

    def _own_condition(self, encoding: Encoding, batch: int) -> Condition | None:
        """The condition that holds the branch at hand alone; None where the value is known already."""
        if self._found is not None:
            return None
        if self.is_conditional:
            return Condition(self._texts(batch), encoding)
        return Condition(self._texts(batch), {}, encoding, self._scale)

    def _separately(self, latents: Tensor, sigma: float) -> tuple[Tensor, Tensor]:
        """V and its gradient by a pass of their own."""
        cond, *uncond = (encoding for _, _, encoding in self._branches)
        texts = self._texts(len(latents))
        condition = Condition(texts, cond, uncond[0], self._scale) if uncond else Condition(texts, cond)
        with frozen(self.value.backbone.denoiser):
            return self.value.value_and_grad(latents, sigma, condition)


class _BranchHook(ModelHook):
    def __init__(self, run: Callable):
        super().__init__()
        self.run = run

    def new_forward(self, module: nn.Module, *args, **kwargs) -> Any:
        return self.run(self.fn_ref.original_forward, *args, **kwargs)


def _as_output(prediction: Tensor, return_dict: bool):
    if not return_dict:
        return (prediction,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=prediction)
