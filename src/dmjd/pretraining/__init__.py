"""``pretrain(config)`` and ``bench(config)``."""
