"""`python -m onebase_server`: serve by the environment's settings alone. `onebase serve` adds flags."""

import os
import sys

from onebase.errors import OnebaseError
from onebase_server.compose import serve
from onebase_server.settings import load_settings


def main() -> int:
    try:
        return serve(load_settings(os.environ))
    except OnebaseError as error:
        sys.stderr.write(f"error: {error.message}\n")
        return 1


if __name__ == "__main__":
    sys.exit(main())
