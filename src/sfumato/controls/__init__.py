"""The control techniques, one a file, in any combination."""

from sfumato.controls.base import Control, Env, Request
from sfumato.controls.cfg import CFG
from sfumato.controls.controlnet import ControlNet
from sfumato.controls.inpaint import Inpaint

__all__ = ["CFG", "Control", "ControlNet", "Env", "Inpaint", "Request"]
