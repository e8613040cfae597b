"""Write problems and answers into the parquet file that verl trains on.

python examples/verl/prepare_math.py math_train.jsonl data/math/train.parquet

Reads JSON lines or parquet with the columns `problem` and `answer` (what belongs into the box), which is how MATH is published
after its solutions' boxes were taken out. Needs pandas and pyarrow, which verl has.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

SYSTEM = "Please reason step by step, and put your final answer within \\boxed{}."  # Qwen2.5-Math's own
SOURCE = "DigitalLearningGmbH/MATH-lighteval"  # the name by which verl chooses its reward function for MATH


def to_verl(problems: pd.DataFrame) -> pd.DataFrame:
    """Return the problems in the columns that verl reads, one row a problem."""
    missing = {"problem", "answer"} - set(problems.columns)
    if missing:
        raise ValueError(f"columns: expected problem and answer, got {list(problems.columns)}")
    rows = []
    for i, (problem, answer) in enumerate(zip(problems["problem"], problems["answer"], strict=True)):
        prompt = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": str(problem)}]
        reward = {"style": "rule", "ground_truth": str(answer)}
        extra = {"index": i}
        rows.append(
            {"data_source": SOURCE, "prompt": prompt, "ability": "math", "reward_model": reward, "extra_info": extra}
        )
    return pd.DataFrame(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="JSON lines or parquet")
    parser.add_argument("target", type=Path, help="parquet; must not exist")
    args = parser.parse_args()
    if args.target.exists():
        parser.error(f"target: expected a file that does not exist, got {args.target}")
    problems = (
        pd.read_parquet(args.source)
        if args.source.suffix == ".parquet"
        else pd.read_json(args.source, lines=True, dtype=False)
    )
    args.target.parent.mkdir(parents=True, exist_ok=True)
    to_verl(problems).to_parquet(args.target)
    print(f"{len(problems)} problems in {args.target}")


if __name__ == "__main__":
    main()
