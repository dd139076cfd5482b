"""The kernels in plain torch: slow, obvious, and the definition the fast ones are tested against.

Knows nothing about devices or adapters; called by tests and wherever no faster backend exists.
Legend: see kernels/__init__.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from loraswarm.kernels import MAX_TILE_RANKS, AttentionWork, HeadNorms, TileTable
from loraswarm.kernels.arguments import check_add_rms_norm, check_rotate, check_silu_multiply
from loraswarm.kernels.pool_views import pool_rows, pool_vector
from loraswarm.kernels.reference_merging import empty_linear as empty_linear
from loraswarm.kernels.reference_merging import linear_norm as linear_norm
from loraswarm.kernels.reference_merging import merge_linear_ as merge_linear_


def lora_shrink(
    x_TI: Tensor, pool: Tensor, tiles: TileTable, first_site: int, num_parts: int
) -> Tensor:
    """Project each token onto the ranks of its segment's tiles, for every part of a fused linear.

    Semantics, for token t of segment g, part q and the j-th tile n of g at site first_site + q:
        h[q, t, 16 j : 16 j + ranks[n]] = A[n] @ x[t]
    Columns beyond a segment's ranks are undefined; expand does not read them.

    Shapes    x [T, I] f16|bf16|f32; pool [elements] of x's dtype; returns [Q, T, R] float32 with
              R = 16 * tiles.part_tiles(first_site, num_parts).
    Numerics  products of the stored values, accumulated in float32 in a fixed order.
    Raises    ValueError naming the argument, for a wrong dtype, device or shape.
    Source    Hu et al. 2021 (LoRA); grouping after SGMV in Punica (arXiv 2310.18547).
    """
    check_shrink(x_TI, pool, tiles)
    check_sites(tiles, first_site, num_parts)
    num_tokens, in_features = x_TI.shape
    num_columns = MAX_TILE_RANKS * tiles.part_tiles(first_site, num_parts)
    h_QTR = torch.zeros(num_parts, num_tokens, num_columns, dtype=torch.float32)
    for part in range(num_parts):
        for begin, end, tile, column in _segment_tiles(tiles, first_site + part):
            ranks = int(tiles.ranks[tile])
            a_at, a_stride = int(tiles.a_offset[tile]), int(tiles.a_stride[tile])
            a_RI = pool_rows(pool, a_at, a_stride, (ranks, in_features))
            h_QTR[part, begin:end, column : column + ranks] = x_TI[begin:end].float() @ a_RI.T
    return h_QTR


def lora_expand_(
    y_TO: Tensor,
    h_QTR: Tensor,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    out_bounds: tuple[int, ...],
) -> None:
    """Apply each token's low-rank updates, then its gains, to `y_TO` in place.

    Semantics, for token t of segment g and part q = columns out_bounds[q] : out_bounds[q + 1] of y:
        y[t, part q] = gain * (y[t, part q] + delta) + constant
        delta = sum over the tiles n (the j-th of g at site first_site + q) of
            v[n] * ((scale[n] * u[n] * h[q, t, 16 j : 16 j + ranks[n]]) @ Bt[n])
    with gain and constant at `gain_offset[first_site + q, g]`; absent vectors are ones, an absent
    constant is zero. Columns of h that no tile has are not read. Tokens keep their bits in the
    parts where their segment has neither tiles nor gains.

    Shapes    y [T, O] f16|bf16|f32, written; h [Q, T, R] float32 from `lora_shrink`, R = 0 where no
              segment has tiles; pool [elements] of y's dtype; out_bounds has Q + 1 ascending
              numbers, 0 to O.
    Numerics  everything in float32; one rounding, when y is written.
    Raises    ValueError naming the argument, for a wrong dtype, device or shape; y is unchanged.
    Source    as `lora_shrink`; u and v: Kopiczko et al. 2023 (VeRA); gains: Liu et al. 2022 (IA3),
              Liu et al. 2024 (DoRA).
    """
    check_expand(y_TO, h_QTR, pool, tiles, out_bounds)
    check_sites(tiles, first_site, len(out_bounds) - 1)
    bounds = list(pairwise(tiles.segments.tolist()))
    for part, (low, high) in enumerate(pairwise(out_bounds)):
        site, width = first_site + part, high - low
        for segment, (begin, end) in enumerate(bounds):
            gain_at, constant_at = tiles.gain_offset[site, segment].tolist()
            first, last = tiles.ranges[site, segment].tolist()
            if first == last and gain_at < 0 and constant_at < 0:
                continue
            y_part = y_TO[begin:end, low:high]
            sum_TO = y_part.float()
            for tile in range(first, last):
                column = MAX_TILE_RANKS * (tile - first)
                h_TR = h_QTR[part, begin:end, column : column + int(tiles.ranks[tile])]
                sum_TO = sum_TO + _tile_update(h_TR, pool, tiles, tile, width)
            gain_O = pool_vector(pool, gain_at, width, absent=1.0)
            constant_O = pool_vector(pool, constant_at, width, absent=0.0)
            y_part.copy_((gain_O * sum_TO + constant_O).to(y_TO.dtype))


def write_kv_(pages: Tensor, layer: int, k_TKE: Tensor, v_TKE: Tensor, slots_T: Tensor) -> None:
    """Store K and V of each token in its page, in place.

    Semantics    pages[slot // C, layer, 0, :, slot % C, :] = k[t], and index 1 for v.
    Shapes       pages [P, layers, 2, K, C, E]; k, v [T, K, E] of the same dtype; slots [T] int64.
    Raises       ValueError naming the argument; nothing is written.
    """
    check_write_kv(pages, k_TKE, v_TKE, slots_T)
    page_tokens = pages.shape[4]
    page_T, row_T = slots_T // page_tokens, slots_T % page_tokens
    pages[page_T, layer, 0, :, row_T] = k_TKE
    pages[page_T, layer, 1, :, row_T] = v_TKE


def rotate_and_write_kv_(
    qkv_TNE: Tensor,
    num_heads: int,
    cos_T1E: Tensor,
    sin_T1E: Tensor,
    pages: Tensor,
    layer: int,
    slots_T: Tensor,
    norms: HeadNorms | None = None,
) -> None:
    """Rotate q in place and k on its way into the pages; store k and v there.

    Semantics    x * cos + swap(x) * sin for the heads x of q and k, swap exchanging the halves of a
                 head. With `norms`, x is first divided by sqrt(mean(x ** 2) + eps) in float32, then
                 multiplied by its weight. Then `write_kv_`.
    Shapes       qkv [T, H + 2 K, E], contiguous: q, k, v; E even; cos, sin [T, 1, E], the sine of
                 the first half negated; pages and slots as in `write_kv_`.
    Numerics     rounds to the dtype after the division, after every product and after the sum.
    Raises       ValueError naming the argument; nothing is written.
    q is written; what is left in the place of k is undefined.
    """
    check_rotate(qkv_TNE, num_heads, (cos_T1E, sin_T1E), pages, slots_T, norms)
    num_qk_heads = qkv_TNE.shape[1] - pages.shape[3]
    qk_TNE = qkv_TNE[:, :num_qk_heads]
    if norms is not None:
        means_TN1 = qk_TNE.float().pow(2).mean(-1, keepdim=True)
        qk_TNE = (qk_TNE.float() * (means_TN1 + norms.eps).rsqrt()).to(qk_TNE.dtype)
        q_THE, k_TKE = qk_TNE.tensor_split((num_heads,), dim=1)
        qk_TNE = torch.cat((q_THE * norms.q_weight_E, k_TKE * norms.k_weight_E), dim=1)
    low_TNF, high_TNF = qk_TNE.chunk(2, dim=-1)
    swapped_TNE = torch.cat((high_TNF, low_TNF), dim=-1)
    qk_TNE = qk_TNE * cos_T1E + swapped_TNE * sin_T1E
    qkv_TNE[:, :num_heads] = qk_TNE[:, :num_heads]
    write_kv_(pages, layer, qk_TNE[:, num_heads:], qkv_TNE[:, num_qk_heads:], slots_T)


def paged_attention(
    q_THE: Tensor,
    pages: Tensor,
    layer: int,
    work: AttentionWork,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of each token over its sequence's pages; decode and chunked prefill alike.

    Semantics, for the i-th of n new tokens of a sequence with context length c, at p = c - n + i:
        out = softmax(scale * q . k[j]) v[j]  over  max(0, p - window + 1) <= j <= p
    without `window`, over 0 <= j <= p. Query head h reads kv head h // (H / K).

    Shapes    q [T, H, E]; pages [P, layers, 2, K, C, E] of its dtype; returns [T, H, E] of it.
    Numerics  scores, softmax and sums in float32; one rounding at the end.
    Raises    ValueError naming the argument, for a wrong dtype or shape.
    """
    check_attention(q_THE, pages, work)
    check_window(window)
    out_THE = torch.empty_like(q_THE)
    group = q_THE.shape[1] // pages.shape[3]
    starts = work.query_starts.tolist()
    for sequence, context in enumerate(work.context_lens.tolist()):
        begin, end = starts[sequence], starts[sequence + 1]
        num_pages = -(-context // pages.shape[4])
        page_ids = work.page_table[sequence, :num_pages].long()
        kv_2KCE = pages[page_ids, layer].permute(1, 2, 0, 3, 4).flatten(2, 3)[:, :, :context]
        k_HCE, v_HCE = kv_2KCE.float().repeat_interleave(group, dim=1)
        q_HTE = q_THE[begin:end].float().transpose(0, 1)
        scores_HTC = scale * (q_HTE @ k_HCE.transpose(1, 2))
        position_T1 = torch.arange(context - (end - begin), context)[:, None]
        key_1C = torch.arange(context)[None]
        hidden_TC = key_1C > position_T1
        if window is not None:
            hidden_TC |= key_1C <= position_T1 - window
        scores_HTC.masked_fill_(hidden_TC, float("-inf"))
        out_HTE = scores_HTC.softmax(dim=-1) @ v_HCE
        out_THE[begin:end] = out_HTE.transpose(0, 1).to(q_THE.dtype)
    return out_THE


def add_rms_norm_(
    x_TD: Tensor,
    delta_TD: Tensor | None,
    weight_D: Tensor | None,
    eps: float,
    rows_Z: Tensor | None = None,
) -> Tensor:
    """Add `delta` to `x`, in place, and scale the rows of the sum to a mean square of 1.

    Semantics, for each row t, or with `rows_Z` for each of these alone:
        x[t] += delta[t]
        out = weight * (x[t] / sqrt(mean(x[t] ** 2) + eps))
    An absent delta adds nothing, an absent weight multiplies by nothing.

    Shapes    x [T, D] f16|bf16|f32, written; delta [T, D] and weight [D] of its dtype; rows [Z]
              int64, ascending; returns [T, D], or [Z, D] in the order of `rows_Z`.
    Numerics  in float32; rounded to x's dtype as sum, as quotient and as product.
    Raises    ValueError naming the argument, for a wrong dtype, shape or row; x is unchanged.
    """
    check_add_rms_norm(x_TD, delta_TD, weight_D, rows_Z)
    sum_ZD = x_TD if rows_Z is None else x_TD[rows_Z]
    if delta_TD is not None:
        sum_ZD += delta_TD if rows_Z is None else delta_TD[rows_Z]
    if rows_Z is not None:
        x_TD[rows_Z] = sum_ZD
    normed_ZD = F.rms_norm(sum_ZD, sum_ZD.shape[-1:], None, eps)
    return normed_ZD if weight_D is None else normed_ZD * weight_D


def silu_multiply(gate_up_TF2: Tensor) -> Tensor:
    """silu(gate) * up of each token.

    Semantics    out[t, f] = z / (1 + exp(-z)) * gate_up[t, F + f]  with  z = gate_up[t, f].
    Shapes       gate_up [T, 2 F] f16|bf16|f32; returns [T, F] of its dtype.
    Numerics     in float32; rounded to the dtype as silu and as product.
    Raises       ValueError naming the argument, for a wrong shape.
    """
    check_silu_multiply(gate_up_TF2)
    gate_TF, up_TF = gate_up_TF2.chunk(2, dim=-1)
    return F.silu(gate_TF) * up_TF


def pack_linear(weight_OI: Tensor) -> None:
    """The weight in the order that `linear` reads, or None: torch multiplies by it."""


def linear(x_TI: Tensor, weight: Tensor, bias_O: Tensor | None, is_float32: bool = False) -> Tensor:
    """The product with a weight that `pack_linear` has packed (here: [O, I] as it is), plus bias.

    Shapes    x [T, I]; bias [O] of its dtype; returns [T, O] of it; float32 with `is_float32`.
    Numerics  accumulated in float32; one rounding to x's dtype, with `is_float32` too.
    Raises    ValueError naming the argument, for a wrong dtype or shape.
    """
    _require(
        x_TI.dim() == 2 and x_TI.shape[1] == weight.shape[1],
        f"x_TI is {tuple(x_TI.shape)}; it must be [T, {weight.shape[1]}]",
    )
    _require(x_TI.dtype == weight.dtype, f"x_TI is {x_TI.dtype}, the weight is {weight.dtype}")
    y_TO = F.linear(x_TI, weight, bias_O)
    return y_TO.float() if is_float32 else y_TO


def linear_shrink(
    x_TI: Tensor,
    weight: Tensor,
    bias_O: Tensor | None,
    pool: Tensor,
    tiles: TileTable,
    first_site: int,
    num_parts: int,
) -> tuple[Tensor, Tensor]:
    """`linear` and `lora_shrink` of the same x: y [T, O] and h [Q, T, R]."""
    y_TO = linear(x_TI, weight, bias_O)
    return y_TO, lora_shrink(x_TI, pool, tiles, first_site, num_parts)


def recording() -> AbstractContextManager[None]:
    """Between entering it and leaving it, or `finish`, what kernels return may not yet be computed,
    and only kernels may read or write it. Here everything is computed at once."""
    return nullcontext()


def finish() -> None:
    """Compute what has been recorded: nothing here."""


def warm_up(dtype_name: str, report: Callable[[str], None]) -> None:
    """Nothing to compile."""


def check_shrink(x_TI: Tensor, pool: Tensor, tiles: TileTable) -> None:
    """Raise ValueError if the arguments of `lora_shrink` disagree."""
    _require(x_TI.dim() == 2 and x_TI.is_contiguous(), "x_TI must be a contiguous [T, I] tensor")
    _require(pool.dim() == 1 and pool.is_contiguous(), "pool must be a contiguous flat tensor")
    _require(pool.dtype == x_TI.dtype, f"pool is {pool.dtype}, x_TI is {x_TI.dtype}")
    _require(
        tiles.segments.numel() == tiles.ranges.shape[1] + 1,
        "tiles.ranges has another number of segments than tiles.segments",
    )


def check_sites(tiles: TileTable, first_site: int, num_parts: int) -> None:
    """Raise ValueError if a fused linear's sites are not all in the table."""
    num_sites = len(tiles.max_tiles)
    _require(
        num_parts >= 1 and 0 <= first_site <= num_sites - num_parts,
        f"sites {first_site} to {first_site + num_parts - 1} are not in a table of {num_sites}",
    )


def check_expand(
    y_TO: Tensor, h_QTR: Tensor, pool: Tensor, tiles: TileTable, out_bounds: tuple[int, ...]
) -> None:
    """Raise ValueError if the arguments of `lora_expand_` disagree."""
    _require(y_TO.dim() == 2 and y_TO.stride(1) == 1, "y_TO must be [T, O] with contiguous rows")
    _require(h_QTR.dtype == torch.float32, "h_QTR must be float32")
    _require(h_QTR.dim() == 3 and h_QTR.is_contiguous(), "h_QTR must be a contiguous [Q, T, R]")
    _require(pool.dim() == 1 and pool.is_contiguous(), "pool must be a contiguous flat tensor")
    _require(pool.dtype == y_TO.dtype, f"pool is {pool.dtype}, y_TO is {y_TO.dtype}")
    _require(h_QTR.shape[1] == y_TO.shape[0], "h_QTR and y_TO have different numbers of tokens")
    _require(
        h_QTR.shape[0] == len(out_bounds) - 1
        and (out_bounds[0], out_bounds[-1]) == (0, y_TO.shape[1])
        and all(low <= high for low, high in pairwise(out_bounds)),
        f"out_bounds {out_bounds} does not cut y_TO {tuple(y_TO.shape)} into h_QTR's parts",
    )
    _require(
        tiles.segments.numel() == tiles.ranges.shape[1] + 1,
        "tiles.ranges has another number of segments than tiles.segments",
    )
    _require(
        tiles.gain_offset.shape == tiles.ranges.shape,
        "tiles.gain_offset has another shape than tiles.ranges",
    )


def check_write_kv(pages: Tensor, k_TKE: Tensor, v_TKE: Tensor, slots_T: Tensor) -> None:
    """Raise ValueError if the arguments of `write_kv_` disagree."""
    _require(pages.dim() == 6, "pages must be [P, layers, 2, K, C, E]")
    _require(k_TKE.shape == v_TKE.shape, "k_TKE and v_TKE differ in shape")
    _require(
        k_TKE.shape[1:] == (pages.shape[3], pages.shape[5]), "k_TKE does not match pages' K and E"
    )
    _require(k_TKE.dtype == v_TKE.dtype == pages.dtype, "k_TKE, v_TKE and pages differ in dtype")
    _require(slots_T.shape == k_TKE.shape[:1], "slots_T must have one slot per token")
    _require(slots_T.dtype == torch.int64, f"slots_T is {slots_T.dtype}; it must be int64")


def check_attention(q_THE: Tensor, pages: Tensor, work: AttentionWork) -> None:
    """Raise ValueError if the arguments of `paged_attention` disagree."""
    _require(pages.dim() == 6, "pages must be [P, layers, 2, K, C, E]")
    _require(q_THE.dim() == 3 and q_THE.shape[2] == pages.shape[5], "q_THE has another head size")
    _require(q_THE.shape[1] % pages.shape[3] == 0, "query heads are not a multiple of kv heads")
    _require(q_THE.dtype == pages.dtype, f"q_THE is {q_THE.dtype}, pages are {pages.dtype}")
    _require(
        work.query_starts.numel() == work.context_lens.numel() + 1,
        "work.query_starts must have one more entry than work.context_lens",
    )
    _require(
        work.page_table.dim() == 2
        and work.page_table.shape[0] == work.context_lens.numel()
        and work.page_table.is_contiguous(),
        "work.page_table must be contiguous, with one row per entry of work.context_lens",
    )


def check_window(window: int | None) -> None:
    """Raise ValueError if a token could not even see itself."""
    _require(window is None or window >= 1, f"window is {window}; it must be None or at least 1")


def _segment_tiles(tiles: TileTable, site: int) -> Iterator[tuple[int, int, int, int]]:
    """(first token, end token, tile, first column of h) of every tile that runs at `site`."""
    segments = tiles.segments.tolist()
    for segment, (first, last) in enumerate(tiles.ranges[site].tolist()):
        for tile in range(first, last):
            column = MAX_TILE_RANKS * (tile - first)
            yield segments[segment], segments[segment + 1], tile, column


def _tile_update(h_TR: Tensor, pool: Tensor, tiles: TileTable, tile: int, width: int) -> Tensor:
    """v * ((scale * u * h) @ Bt) of one tile: [T, O] float32."""
    ranks = h_TR.shape[1]
    bt_RO = pool_rows(pool, int(tiles.bt_offset[tile]), int(tiles.bt_stride[tile]), (ranks, width))
    u_R = pool_vector(pool, int(tiles.u_offset[tile]), ranks, absent=1.0)
    v_O = pool_vector(pool, int(tiles.v_offset[tile]), width, absent=1.0)
    return v_O * ((float(tiles.scale[tile]) * u_R * h_TR) @ bt_RO)


def _require(holds: bool, message: str) -> None:
    if not holds:
        raise ValueError(message)
