"""Was pre-training worth it? Classify with a few labels per class, from pre-trained and from random weights.

python examples/low_shot.py runs/mine --data ~/labeled --labels folder --labels-per-class 10
"""

import argparse

import dmjd


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="run folder of dmjd pretrain")
    parser.add_argument("--data", help="labeled images with train/ and test/; default the run's own")
    parser.add_argument("--labels", choices=("folder", "column"), help="source of the labels; default as in the run")
    parser.add_argument("--labels-per-class", type=int, default=10)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()

    settings = {"labels_per_class": given.labels_per_class, "seeds": given.seeds}
    if given.data is not None:
        settings |= {"data": given.data, "labels": given.labels or "folder"}
    probe = dmjd.evaluate("linear", given.run, **settings)
    tuned = dmjd.evaluate("finetune", given.run, steps=given.steps, **settings)
    print(f"top-1 in percent with {given.labels_per_class} labels per class, mean of {given.seeds} draws")
    for name, scores in (("linear probe", probe), ("fine-tuning", tuned)):
        pretrained, scratch = (100 * scores[start]["top1"] for start in ("result", "random_init"))
        print(f"{name:<13} pre-trained {pretrained:5.1f}   random weights {scratch:5.1f}")

    classifier = dmjd.load_classifier(given.run)
    print(f"classes of the classifier: {', '.join(classifier.classes)}")


if __name__ == "__main__":
    main()
