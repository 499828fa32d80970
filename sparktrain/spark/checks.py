"""The audit's checks in SQL: each query's rows are what is wrong, a line ``found`` each; one without rows has passed.

``plan``: the rows on disk; ``promised``: the same, computed again; ``counted``: the receipts that count (``audit.py``,
which also judges C8, the mix of the files). A plan that is another permutation of the same rows passes C1 to C7, as it
is read once all the same: only C9 sees that it is not the order that was promised.
"""

from dataclasses import dataclass

from sparktrain.plan import Assignment


@dataclass(frozen=True)
class Check:
    """``holds`` is true where ``query`` has no rows; ``mend``: what to do where it has some."""

    name: str
    holds: str
    mend: str
    query: str


MEND_PLAN = "the plan was changed: restore run.dir/plan, or start again in another run.dir"
MEND_LEDGER = "what the run has trained on is not what was planned: do not trust it; start again in another run.dir"
MEND_BYTES = "restore the shards that the run was planned with; if they were other ones in training, start again"

CHECKS = (
    Check(
        "C1",
        "positions follow one another from 0, each once",
        MEND_PLAN,
        """select concat_ws(' ', n, 'rows at positions', lo, 'to', hi, 'where', {positions}, 'from 0 on belong') found
           from (select count(*) n, min(pos) lo, max(pos) hi, sum(cast(pos as decimal(38, 0))) total from {plan})
           where n <> {positions} or lo <> 0 or hi <> {positions} - 1
              or total <> cast({positions} as decimal(38, 0)) * ({positions} - 1) / 2""",
    ),
    Check(
        "C2",
        "no microshard comes twice in an epoch",
        MEND_PLAN,
        """select concat('microshard ', microshard_id, ' comes ', count(*), ' times in epoch ', epoch) found
           from {plan} group by epoch, microshard_id having count(*) > 1""",
    ),
    Check(
        "C3",
        "every whole epoch holds what its source has, and nothing that is to be skipped",
        MEND_PLAN,
        """select concat_ws(' ', n, 'microshards', lo, 'to', hi, 'of source', source, 'in epoch', epoch) found
           from (select source, epoch, count(*) n, min(microshard_id) lo, max(microshard_id) hi,
                        sum(cast(microshard_id as decimal(38, 0))) total, max(kept) kept, max(least) least,
                        max(most) most, max(promised) promised
                 from {plan} left join {sources} on microshard_id >= first and microshard_id < last
                 group by source, epoch)
           where source is null or n > kept or (n = kept and (lo <> least or hi <> most or total <> promised))
           union all
           select concat('microshard ', microshard_id, ' is to be skipped') found
           from {plan} join {skipped} on microshard_id >= first and microshard_id < last""",
    ),
    Check(
        "C4",
        "every step has its number of slots, each once",
        MEND_PLAN,
        """select concat_ws(' ', 'step', step, 'has', n, 'rows in slots', lo, 'to', hi, 'expected', batch) found
           from (select step, count(*) n, min(slot) lo, max(slot) hi, sum(cast(slot as long)) total, max(batch) batch
                 from {plan} left join {stretches} on step >= first_step and step < last_step group by step)
           where batch is null or n <> batch or lo <> 0 or hi <> batch - 1 or total <> batch * (batch - 1) div 2""",
    ),
    Check(
        "C5",
        "every committed slot has one receipt, for its own microshard",
        MEND_LEDGER,
        """select kind, case kind
                when 'missing' then concat_ws(' ', 'no receipt for slot', slot, 'of step', step)
                when 'doubled' then concat_ws(' ', n, 'receipts for slot', slot, 'of step', step)
                else concat_ws(' ', 'receipt for microshard', got, 'in slot', slot, 'of step', step, 'which has',
                               coalesce(cast(planned as string), 'none')) end found
           from (select *, case when n = 0 then 'missing' when n > 1 then 'doubled'
                                when planned is null or got <> planned then 'other' end kind
                 from (select step, slot, max(planned) planned, count(got) n, max(got) got
                       from (select step, slot, microshard_id planned, cast(null as long) got
                             from {plan} where step < {committed}
                             union all select step, slot, null, microshard_id from {counted})
                       group by step, slot))
           where kind is not null""",
    ),
    Check(
        "C6",
        "every microshard lies inside its shard",
        MEND_PLAN,
        """select concat_ws(' ', length, 'tokens from token', start, 'of', path, 'which has', num_tokens) found
           from {plan} left join {shards} using (path)
           where num_tokens is null or start < 0 or start + length > num_tokens or length <> {length}""",
    ),
    Check(
        "C7",
        "every reading of a microshard had the same bytes",
        MEND_BYTES,
        """select concat_ws(' ', 'microshard', microshard_id, 'was read with', count(distinct digest), 'digests and',
                            count(distinct targets), 'numbers of targets') found
           from {counted} group by microshard_id having count(distinct digest) > 1 or count(distinct targets) > 1""",
    ),
    Check(
        "C9",
        "the plan is the one that its seed gives",
        MEND_PLAN,
        f"""select concat_ws(' ', 'position', coalesce(p.pos, q.pos), 'has microshard', p.microshard_id, 'expected',
                             q.microshard_id) found
            from {{plan}} p full outer join {{promised}} q on p.pos = q.pos
            where not ({" and ".join(f"p.{name} <=> q.{name}" for name in Assignment._fields)})""",
    ),
)
