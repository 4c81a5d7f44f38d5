"""The control techniques, one a file, in any combination."""

from sfumato.controls.attend_and_excite import AttendAndExcite
from sfumato.controls.base import Control, Env, Request
from sfumato.controls.cfg import CFG
from sfumato.controls.controlnet import ControlNet
from sfumato.controls.deepcache import DeepCache
from sfumato.controls.depth import Depth
from sfumato.controls.inpaint import Inpaint
from sfumato.controls.instruct_pix2pix import InstructPix2Pix
from sfumato.controls.pag import PAG
from sfumato.controls.pix2pix_zero import Pix2PixZero
from sfumato.controls.sag import SAG
from sfumato.controls.sega import SEGA, Edit
from sfumato.controls.token_merging import TokenMerging

__all__ = [
    "CFG",
    "PAG",
    "SAG",
    "SEGA",
    "AttendAndExcite",
    "Control",
    "ControlNet",
    "DeepCache",
    "Depth",
    "Edit",
    "Env",
    "Inpaint",
    "InstructPix2Pix",
    "Pix2PixZero",
    "Request",
    "TokenMerging",
]
