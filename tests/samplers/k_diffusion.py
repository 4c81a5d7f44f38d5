"""A sampler of k-diffusion that diffusers lacks, in the shape of diffusers' schedulers. Imports torch."""

from __future__ import annotations

from typing import Any

from diffusers import KDPM2AncestralDiscreteScheduler
from diffusers.utils.torch_utils import randn_tensor


class DPMpp2SAncestralScheduler(KDPM2AncestralDiscreteScheduler):
    """sample_dpmpp_2s_ancestral. Its noise levels, the middle of each step among them, are those of DPM2 ancestral."""

    def step(self, model_output: Any, timestep: Any, sample: Any, return_dict: bool = True) -> Any:
        if self.step_index is None:
            self._init_step_index(timestep)
        first = self.state_in_first_order
        row = self.step_index if first else self.step_index - 1
        sigma, down, up = self.sigmas[row], self.sigmas_down[self.step_index - 1], self.sigmas_up[row]
        middle = self.sigmas_interpol[row]
        seen = sigma if first else middle
        if self.config.prediction_type == "epsilon":
            denoised = sample - seen * model_output
        else:
            denoised = sample / (seen**2 + 1) - model_output * seen / (seen**2 + 1) ** 0.5
        if first:
            self.sample = sample
            sample = middle / sigma * sample + (1 - middle / sigma) * denoised
        else:
            sample = down / sigma * self.sample + (1 - down / sigma) * denoised
            sample = sample + up * randn_tensor(sample.shape)
            self.sample = None
        self._step_index += 1
        return (sample,)
