"""The program: `jaxsft`, `python -m jaxsft` and `run.py` begin here, and end here on Windows."""

import sys

WINDOWS = (
    "jaxsft needs Linux or macOS: it locks files and watches signals in ways that Windows does not have. "
    "On Windows, install and run it inside WSL (https://learn.microsoft.com/windows/wsl)."
)


def main() -> int:
    """Runs the command of this process's arguments; returns its exit code."""
    if sys.platform == "win32":
        print(f"error: {WINDOWS}", file=sys.stderr)
        return 1
    from jaxsft.interrupts import end_imports_at_once

    end_imports_at_once()
    from jaxsft import cli

    return cli.main()


if __name__ == "__main__":
    sys.exit(main())
