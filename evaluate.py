"""Stage 3: where the models look and what they answer, on held-out pictures in which every word's place is known.

    python evaluate.py --data toy --seeds 3 --train "--qlora --num_train_epochs 20"     trains three pairs, then compares them
    python evaluate.py --data toy --plain runs/toy-plain --lavender runs/toy-lora       finished runs of train.py
    python evaluate.py --adapter runs/flickr30k-qlora --image my.jpg --question "What is this?"     one's own picture

The flags stand in lavender_min/evaluation/flags.py, the work is done in lavender_min/evaluation/.
"""

import sys

from lavender_min.evaluation.command import main

if __name__ == "__main__":
    sys.exit(main())
