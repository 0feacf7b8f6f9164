"""Instances of the NF4 matmul kernels in cuda/nf4.cuh: their sizes, names, shared memory. Plain numbers, no torch."""

from dataclasses import dataclass

_TILE_BYTES, _TABLE_BYTES = 576, 65536


@dataclass(frozen=True, slots=True)
class Small:
    """`small_kernel<W, D>`: W warps split K, D pairs of tiles in each warp's ring."""

    warps: int
    depth: int

    @property
    def name(self) -> str:
        return f"nf4_small_{self.warps}_{self.depth}"

    @property
    def threads(self) -> int:
        return self.warps * 32

    @property
    def source(self) -> str:
        return f"SMALL({self.name}, {self.warps}, {self.depth})"

    def shared_bytes(self, m: int, blocks: int) -> int:
        ring = self.warps * self.depth * 2 * _TILE_BYTES
        return _TABLE_BYTES + ring + 2 * self.warps * 16 * m * 4 + m * (blocks * 128 + 16)


@dataclass(frozen=True, slots=True)
class Wide:
    """`wide_kernel<NT, R, WN, WK, D>`: up to 8 NT tokens, 16 R WN rows and 64 WK columns a step, D steps."""

    token_tiles: int
    row_tiles: int
    row_warps: int
    k_warps: int
    depth: int

    @property
    def name(self) -> str:
        return f"nf4_wide_{self.token_tiles}_{self.row_tiles}_{self.row_warps}_{self.k_warps}_{self.depth}"

    @property
    def threads(self) -> int:
        return self.row_warps * self.k_warps * 32

    @property
    def rows(self) -> int:
        return self.row_warps * self.row_tiles * 16

    @property
    def stage_blocks(self) -> int:
        return self.k_warps

    @property
    def source(self) -> str:
        sizes = f"{self.token_tiles}, {self.row_tiles}, {self.row_warps}, {self.k_warps}, {self.depth}"
        return f"WIDE({self.name}, {sizes})"

    @property
    def shared_bytes(self) -> int:
        x = self.k_warps * self.token_tiles * 8 * 144
        weights = self.row_warps * self.k_warps * self.row_tiles * _TILE_BYTES
        sums = self.row_tiles * self.token_tiles * 4 * self.row_warps * 32 * 4 if self.k_warps > 1 else 0
        return _TABLE_BYTES + self.depth * (x + weights) + 16 + sums

    @property
    def partial_floats(self) -> int:
        """Of one CTA: it shares at most two row blocks with others."""
        return 2 * self.rows * self.token_tiles * 8


@dataclass(frozen=True, slots=True)
class Group:
    """`wg_kernel<N, WR, WK, B, D>` (Hopper): up to N tokens, 64 WR rows and 64 WK B columns a stage, D stages."""

    tokens: int
    row_groups: int
    k_groups: int
    blocks: int
    depth: int

    @property
    def name(self) -> str:
        return f"nf4_wg_{self.tokens}_{self.row_groups}_{self.k_groups}_{self.blocks}_{self.depth}"

    @property
    def threads(self) -> int:
        return (self.row_groups * self.k_groups + 1) * 128

    @property
    def rows(self) -> int:
        return self.row_groups * 64

    @property
    def stage_blocks(self) -> int:
        return self.k_groups * self.blocks

    @property
    def source(self) -> str:
        sizes = f"{self.tokens}, {self.row_groups}, {self.k_groups}, {self.blocks}, {self.depth}"
        return f"WG({self.name}, {sizes})"

    @property
    def shared_bytes(self) -> int:
        stage = self.stage_blocks * (self.tokens * 128 + self.row_groups * 4 * _TILE_BYTES)
        sums = self.rows * self.tokens * 4 if self.k_groups > 1 else 0
        return _TABLE_BYTES + self.depth * (-(-stage // 1024) * 1024) + 1024 + sums

    @property
    def partial_floats(self) -> int:
        """Of one CTA."""
        return self.rows * self.tokens


Variant = Small | Wide | Group

SMALL: dict[str, Variant] = {"small": Small(8, 8), "small16": Small(16, 3)}
WIDE: dict[str, Variant] = {
    "wide8": Wide(1, 2, 4, 4, 6),
    "wide16": Wide(2, 2, 4, 4, 5),
    "wide32": Wide(4, 2, 4, 4, 4),
    "wide64": Wide(8, 2, 4, 2, 4),
    "wide128": Wide(16, 2, 8, 1, 4),
}
"""Tensor cores of any generation since Ampere."""
GROUP: dict[str, Variant] = {
    "wg8": Group(8, 2, 2, 2, 5),
    "wg16": Group(16, 2, 2, 2, 5),
    "wg32": Group(32, 2, 2, 2, 4),
    "wg48": Group(48, 3, 1, 2, 5),
    "wg64": Group(64, 2, 1, 2, 6),
    "wg64_tall": Group(64, 3, 1, 2, 5),
    "wg96": Group(96, 2, 1, 2, 4),
    "wg128": Group(128, 2, 1, 2, 3),
}
"""Hopper."""
MAX_TOKENS = 128
