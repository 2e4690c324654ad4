"""The families of which there are small models, by name."""

from __future__ import annotations

from triptych.demo.family import Family
from triptych.demo.grid_families import GRID_FAMILIES
from triptych.demo.tile_families import TILE_FAMILIES

FAMILIES: dict[str, Family] = {**GRID_FAMILIES, **TILE_FAMILIES}
