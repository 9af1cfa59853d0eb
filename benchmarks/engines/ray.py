"""fedweight on its Ray grid: one worker process a core; on a GPU they share it."""

from .local import main

if __name__ == "__main__":
    main(engine="ray")
