"""Anatomy: finds the sites of any model, with the same roles for every family.

The repeated block list is found by structure, the layers in it by name tables (`families`) and then by shape.
Nothing here reads a weight's values, so a model on the meta device does.

In the order of work: `tree` (modules), `weights`, `given` (roles the user names), `blocks`, `roles`, `attention` and
`sublayers` (inside a block), `order` and `norms`, `outside` (of blocks), `study` (all of these, once), `sites`.
"""

from veneer.anatomy.layout import layout
from veneer.anatomy.sites import sites
from veneer.anatomy.skeleton import skeleton, with_weights

__all__ = ["layout", "sites", "skeleton", "with_weights"]
