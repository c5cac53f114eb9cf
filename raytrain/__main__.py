"""``python -m raytrain`` is the command `raytrain`."""

from raytrain.command import main

if __name__ == "__main__":
    main()
