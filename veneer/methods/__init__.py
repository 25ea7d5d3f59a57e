"""The methods, one file each; `veneer.methods()` lists them."""

from veneer.callable import make_callable

make_callable(__name__)
