"""Writes a CSV table from stdin as a Parquet file: python -m runtime.data.parquet_table OUT.

A process of its own, because the monitor, which has the table, imports no pyarrow.
"""

from __future__ import annotations

import sys


def main() -> int:
    """Returns 0, or 1 with one line on stdout."""
    try:
        import pyarrow
        from pyarrow import csv, parquet
    except ImportError:
        print("writing Parquet needs pyarrow, which is not installed here: pip install pyarrow")
        return 1
    try:
        table = csv.read_csv(sys.stdin.buffer)
        # A column without a single figure is one of figures, too: files of several runs are read together.
        fields = [
            field.with_type(pyarrow.float64()) if pyarrow.types.is_null(field.type) else field for field in table.schema
        ]
        parquet.write_table(table.cast(pyarrow.schema(fields)), sys.argv[1], compression="zstd")
    except (OSError, ValueError) as error:
        print(str(error).splitlines()[0])
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
