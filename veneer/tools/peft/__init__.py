"""Hugging Face PEFT's adapter folders, `adapter_config.json` and `adapter_model.safetensors`: read and written bit-exactly.

The file's keys say which modules are adapted, the shapes their ranks; the config says scales and switches. What a config
asks for and this library does not compute is refused by name, never ignored.
"""

from veneer.tools.peft.folder import load_peft, save_peft
from veneer.tools.peft.formats import FORMATS
from veneer.tools.peft.names import CONFIG

__all__ = ["CONFIG", "FORMATS", "load_peft", "save_peft"]
