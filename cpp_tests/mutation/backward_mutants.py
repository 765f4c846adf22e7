"""Mutants of the backward."""

from __future__ import annotations

from mutant import Mutant

MAIN = "backward/sm80.cuh"
ADDRESS = "backward/sm80_address.cuh"
LOAD = "backward/sm80_load.cuh"
TILE = "backward/tile.cuh"
STORE = "backward/store.cuh"
LAYOUT = "backward/layout.cuh"
DELTA = "backward/delta.cuh"
DQ = "backward/dq.cuh"
TURNS = "backward/turns.cuh"
MASK = "tile/mask.cuh"

BARRIER = "__syncthreads(); "
BLOCK_WAIT = "ptx::cp_async_wait<0>(); "
COME_TO = "Turns::come_to(launch, slot, my.notes); "
TAKE_BLOCK = COME_TO + "my.stage.flip(my.loader.fill); "  # behind the barrier after a block's wait
START_HEAD = COME_TO + "my.loader.start("  # behind the barrier after the notes
WAIT = "Turns::wait(launch, slot, my.notes); "  # before the barrier after dS
LOAD_DOUT = (
    "if constexpr (kConfig.stages_dout == 1) my.loader.template load<Loader::kDout>"
    "(launch, next, slot + 1); "
)
LOAD_Q = "my.loader.template load<Loader::kQ>(launch, next, slot + 1); "
FINISH = "Turns::finish(launch, index); "
STORE_P = "packed.template store<ScoreTile>(my.at.scores + kExchange); "
STAGE_SUMS = "if (warp_query == 0) { store_shared<"


def mutant(
    name: str, *patch: str, cases: str = "shapes", head_dim: int = 64, memory: str = "large"
) -> Mutant:
    """A mutant of one patch: file, old text, new text."""
    file, old, new = patch
    return Mutant(name, "backward", ((file, old, new),), (cases,), head_dim, memory)


def control(
    name: str, *patch: str, cases: tuple[str, ...], head_dim: int = 64, memory: str = "large"
) -> Mutant:
    """A patch that changes nothing that matters."""
    file, old, new = patch
    return Mutant(name, "backward", ((file, old, new),), cases, head_dim, memory, harmless=True)


ORDER = [
    mutant(
        "no barrier after K's and V's wait",
        MAIN,
        BARRIER + "const Places<Shape> at(smem, warp);",
        "const Places<Shape> at(smem, warp);",
        head_dim=192,
        memory="small",
    ),
    mutant("no barrier after a block's wait", MAIN, BARRIER + TAKE_BLOCK, TAKE_BLOCK),
    mutant("no barrier after dS is stored", MAIN, WAIT + BARRIER, WAIT),
    mutant(
        "no wait for Q and dO",
        MAIN,
        BLOCK_WAIT + BARRIER + TAKE_BLOCK,
        BARRIER + TAKE_BLOCK,
    ),
    mutant(
        "no barrier after the notes",
        MAIN,
        BARRIER + START_HEAD,
        START_HEAD,
    ),
    mutant(
        "stages not swapped",
        MAIN,
        "my.stage.flip(my.loader.fill);",
        "if (slot == first_slot) my.stage.flip(my.loader.fill);",
    ),
    mutant(
        "gradients staged over tiles that are read",
        STORE,
        BARRIER + "if constexpr (kPartialSums)",
        "if constexpr (kPartialSums)",
    ),
    mutant(
        "gradients staged over partial sums",
        STORE,
        BARRIER + STAGE_SUMS,
        STAGE_SUMS,
    ),
    mutant(
        "gradients stored before they are complete",
        STORE,
        BARRIER + "store_rows<Copy, Tile>(p.dk,",
        "store_rows<Copy, Tile>(p.dk,",
    ),
]

STATISTICS = [
    mutant(
        "delta missing",
        DELTA,
        "float delta = sum_over_lanes(sum);",
        "float delta = 0.0f * sum_over_lanes(sum);",
    ),
    mutant(
        "dLSE with the wrong sign",
        DELTA,
        "delta -= *row_address(p.dlse,",
        "delta += *row_address(p.dlse,",
    ),
    mutant("LSE in base e", DELTA, "= lse * kLog2e;", "= lse;"),
    mutant(
        "dQ not cleared",
        DELTA,
        "clear_dq(Slot::dq(launch, tile), thread);",
        "",
    ),
    mutant(
        "delta from past the row's end",
        DELTA,
        "if (format.unit == kChunkBytes && bytes > 0)",
        "if (format.unit >= 4 && bytes > 0)",
        cases="row formats",
    ),
    mutant(
        "huge scores' largest probability not 1",
        DELTA,
        "lse -= lse_margin(lse);",
        "",
        cases="values",
    ),
    mutant(
        "flag of huge scores ignored",
        MAIN,
        "const int clean_end = huge ? slot : first_slot",
        "const int clean_end = first_slot",
        cases="values",
    ),
    mutant(
        "probabilities of huge scores unlimited",
        ADDRESS,
        "ptx::min_nan(p.d[m][n][i], 1.0f)",
        "p.d[m][n][i]",
        cases="values",
    ),
]

MASKS = [
    mutant(
        "P not hidden",
        MAIN,
        "if constexpr (kEdge) EdgeTest<Shape>::mask(scores, slot - first_slot, my.notes);",
        "",
    ),
    mutant(
        "dS not hidden",
        MAIN,
        "if (kEdge && EdgeTest<Shape>::hidden(p.d[m][first + n][i])) x = 0.0f;",
        "",
        cases="values",
    ),
    mutant(
        "right edge one key off",
        MAIN,
        ".diagonal = block.row0 - mask.highest + 1",
        ".diagonal = block.row0 - mask.highest",
    ),
    mutant(
        "left edge one key off",
        MAIN,
        "static_cast<unsigned>(mask.highest - mask.lowest)",
        "static_cast<unsigned>(mask.highest - mask.lowest + 1)",
        cases="masks",
    ),
    mutant(
        "block with keys past the end taken for whole",
        MASK,
        "if (k0 + block_k > seqlen_k) range.full_end = range.full_begin;",
        "",
        cases="values",
    ),
    mutant(
        "query range starts a block late",
        MASK,
        "min_of(max_of(k0 - highest + 1, 0) / block_q, range.end)",
        "min_of(ceil_div(max_of(k0 - highest + 1, 0), block_q), range.end)",
    ),
    mutant(
        "query range ends a block early",
        MASK,
        "ceil_div(min_of(max_of(last - lowest + 1, 0), seqlen_q), block_q)",
        "min_of(max_of(last - lowest + 1, 0), seqlen_q) / block_q",
    ),
    mutant(
        "queries that see all begin a block early",
        MASK,
        "ceil_div(max_of(last - highest + 1, 0), block_q)",
        "max_of(last - highest + 1, 0) / block_q",
        cases="masks",
    ),
    mutant(
        "queries that see all end a block late",
        MASK,
        "max_of(see_first_until, 0) / block_q",
        "ceil_div(max_of(see_first_until, 0), block_q)",
        cases="masks",
    ),
    mutant(
        "clean blocks end one late",
        MAIN,
        "min(range.full_end, whole_end - 1)",
        "min(range.full_end, whole_end)",
    ),
]

ROWS = [
    mutant(
        "only the first head of a group", MAIN, "block.head * group + g);", "block.head * group);"
    ),
    mutant(
        "queries looked up in the keys' rows",
        LAYOUT,
        "first_slot_q = first_slot(sequence.row_q, b, kBlockQ);",
        "first_slot_q = first_slot(sequence.row_k, b, kBlockQ);",
    ),
    mutant(
        "one row of a ragged block too many",
        TILE,
        "i * kRowsPerPass < rows_left ? bytes",
        "i * kRowsPerPass <= rows_left ? bytes",
    ),
    mutant(
        "one row of dK and dV too many",
        STORE,
        "if (row >= block.owned) break;",
        "if (row > block.owned) break;",
    ),
    mutant(
        "unused rows of dK and dV not written",
        STORE,
        "if (row >= block.owned) break;",
        "if (row >= block.rows) break;",
        cases="used rows",
    ),
    mutant(
        "unused rows of dK and dV not cleared",
        STORE,
        "if (row >= block.rows) x = make_uint4(0, 0, 0, 0);",
        "",
        cases="values",
    ),
    mutant(
        "unused rows of dQ not written",
        DQ,
        "if (row >= block.owned) break;",
        "if (row >= block.rows) break;",
        cases="used rows",
    ),
    mutant(
        "rows copied past their end",
        TILE,
        "i * kRowsPerPass < rows_left ? bytes - c * Tile::kPanelRowBytes : 0",
        "i * kRowsPerPass < rows_left ? bytes : 0",
        cases="row formats",
        head_dim=192,
    ),
    mutant(
        "dV stored like dK",
        STORE,
        "store_rows<Copy, Tile>(p.dv, launch.dv,",
        "store_rows<Copy, Tile>(p.dv, launch.dk,",
        cases="row formats",
    ),
]

PRODUCTS = [
    mutant("dQ not scaled", DQ, "p.problem.softmax_scale);", "1.0f);"),
    mutant(
        "dQ added to the wrong block",
        MAIN,
        "add_dq(Shape::Slot::dq(launch, slot)",
        "add_dq(Shape::Slot::dq(launch, slot / 2 * 2)",
    ),
    mutant(
        "rows 8 to 15 of dQ in the wrong register",
        LAYOUT,
        "block * 4 + row / 8 % 2 * 2;",
        "block * 4 + row / 8 % 2;",
    ),
    mutant(
        "partner's half of dK not added",
        STORE,
        "add_registers(dk, other, lane);",
        "",
    ),
    mutant(
        "dK not scaled",
        STORE,
        "lane, dk, scale, part);",
        "lane, dk, Scale{1.0f}, part);",
        head_dim=192,
    ),
    mutant(
        "P read before it is exchanged",
        MAIN,
        STORE_P + "share_scores();",
        STORE_P,
        head_dim=192,
    ),
    mutant(
        "dS stored over P that is read",
        MAIN,
        "if constexpr (kConfig.one_exchange) share_scores();",
        "",
        head_dim=192,
    ),
    mutant(
        "every warp the first column part",
        ADDRESS,
        "GradColumns::first_chunk(warp.query)",
        "GradColumns::first_chunk(0)",
        head_dim=192,
    ),
    mutant(
        "columns of dQ cut into runs instead of parts of panels",
        LAYOUT,
        "warp = row / kRows * kWarpCols + Columns::part(col);",
        "warp = row / kRows * kWarpCols + col / kCols;",
        head_dim=192,
    ),
    mutant(
        "partner's scores read from the wrong half",
        ADDRESS,
        "(1 - warp.query) * kQueries / 8",
        "warp.query * kQueries / 8",
        head_dim=192,
        memory="small",
    ),
    mutant(
        "partner's queries taken from the wrong side",
        MAIN,
        "? Shape::kHalfBytes : -Shape::kHalfBytes);",
        "? -Shape::kHalfBytes : Shape::kHalfBytes);",
        head_dim=192,
        memory="small",
    ),
    mutant(
        "dO loaded over the one that is read",
        MAIN,
        WAIT + BARRIER + LOAD_DOUT,
        LOAD_DOUT + WAIT + BARRIER,
        head_dim=256,
    ),
    mutant(
        "Q loaded over the one that is read",
        MAIN,
        BARRIER + LOAD_Q,
        LOAD_Q,
        head_dim=256,
    ),
    mutant(
        "second pass over dQ's columns repeats the first",
        MAIN,
        "pass * kPanels * KeyTile::kPanelBytes",
        "0",
        head_dim=256,
        memory="small",
    ),
]

# Where thread blocks run one after another, tickets alone put them in order: a turn that is not
# waited for shows in the bits only without them. The machine sees it anyway: nothing orders the
# additions.
TICKET = "const int taken = ticket;"
NO_TICKET = "const int taken = ptx::block_index();"
DETERMINISTIC = [
    mutant("no turn waited for", MAIN, WAIT, "", cases="turns"),
    Mutant(
        "neither turns nor tickets",
        "backward",
        ((MAIN, WAIT, ""), (TURNS, TICKET, NO_TICKET)),
        ("turns",),
    ),
    mutant("turns without tickets", TURNS, TICKET, NO_TICKET, cases="turns"),
    mutant(
        "first key blocks wait, too",
        LAYOUT,
        "word == kNobody ? kPastAll : 0",
        "0",
        cases="turns",
    ),
    mutant(
        "tickets in ascending order",
        TURNS,
        "return ticket / slots * slots + slots - 1 - ticket % slots;",
        "return ticket;",
        cases="turns",
    ),
    mutant(
        "the key block before is the wrong one",
        TURNS,
        "? -1 : index + 1",
        "? -1 : index - 1",
        cases="turns",
    ),
    mutant(
        "the last key block of a head waits",
        TURNS,
        "block.owned <= block_k || block.slot + 1 >= launch.slots_k",
        "false",
        cases="turns",
    ),
    mutant("last turn not passed on", MAIN, BARRIER + FINISH, BARRIER, cases="turns"),
    mutant(
        "turns not cleared",
        DELTA,
        "launch.turns[i] = TurnWords::at_start(i);",
        "",
        cases="turns",
    ),
]

TWO_BARRIERS = (MAIN, WAIT + BARRIER, WAIT + BARRIER + BARRIER)
CONTROLS = [
    control(
        "control: one barrier more",
        *TWO_BARRIERS,
        cases=("shapes", "masks", "used rows", "row formats", "values"),
    ),
    control(
        "control: one barrier more with an exchange",
        *TWO_BARRIERS,
        cases=("shapes", "row formats"),
        head_dim=192,
    ),
    control(
        "control: one barrier more in pairs of warps",
        *TWO_BARRIERS,
        cases=("shapes",),
        head_dim=192,
        memory="small",
    ),
    control(
        "control: one barrier more with one stage",
        *TWO_BARRIERS,
        cases=("shapes",),
        head_dim=256,
    ),
    control(
        "control: one barrier more with two passes",
        *TWO_BARRIERS,
        cases=("shapes",),
        head_dim=256,
        memory="small",
    ),
    control("control: turns and one barrier more", *TWO_BARRIERS, cases=("turns",)),
]

BACKWARD_MUTANTS = ORDER + STATISTICS + MASKS + ROWS + PRODUCTS + DETERMINISTIC + CONTROLS
