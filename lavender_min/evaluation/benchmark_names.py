"""What lmms-eval calls things: its tasks for the paper's benchmarks, and its wrappers for the families of hosts."""

from typing import NamedTuple


class Benchmark(NamedTuple):
    # As the paper's Table 1 names it.
    title: str
    # lmms-eval's task; "" where it has none.
    task: str
    # Which of the task's measures the paper reports. MME's score is the sum of its two.
    measures: tuple[str, ...] = ()
    # A model of OpenAI judges answers of which it is not plain what they say.
    judged: bool = False


# Section 7.2. The text says twenty and counts MMBench as four; Table 1 has sixteen, with one of MMBench beside CCBench.
PAPER = (
    Benchmark("AI2D", "ai2d", ("exact_match",)),
    Benchmark("ChartQA", "chartqa", ("relaxed_overall",)),
    Benchmark("OCRBench", "ocrbench", ("ocrbench_accuracy",)),
    Benchmark("OCRVQA", ""),
    Benchmark("TextVQA", "textvqa_val", ("exact_match",)),
    Benchmark("DocVQA", "docvqa_val", ("anls",)),
    Benchmark("InfoVQA", "infovqa_val", ("anls",)),
    Benchmark("MME", "mme", ("mme_perception_score", "mme_cognition_score")),
    Benchmark("MMBench, English", "mmbench_en_dev", ("gpt_eval_score",), judged=True),
    Benchmark("MMBench, English, 1.1", ""),
    Benchmark("MMBench, Chinese", "mmbench_cn_dev", ("gpt_eval_score",), judged=True),
    Benchmark("MMBench, Chinese, 1.1", ""),
    Benchmark("CCBench", "mmbench_cn_cc", ("gpt_eval_score",), judged=True),
    Benchmark("ScienceQA", "scienceqa_img", ("exact_match",)),
    Benchmark("MMStar", "mmstar", ("average",)),
    Benchmark("MMMU", "mmmu_val", ("mmmu_acc",)),
    Benchmark("RealWorldQA", "realworldqa", ("exact_match",)),
    Benchmark("SEED-Bench, pictures", "seedbench", ("seed_image",)),
    Benchmark("HallusionBench", "hallusion_bench_image", ("aAcc",), judged=True),
    Benchmark("POPE", "pope", ("pope_f1_score",)),
)

# model_type in a config.json ─► lmms-eval's wrapper (`--model`) that loads such a folder.
WRAPPERS = {
    "mllama": "llama_vision",
    "llava": "llava_hf",
    "llava_next": "llava_hf",
    "llava_onevision": "llava_hf",
    "qwen2_vl": "qwen2_vl",
    "qwen2_5_vl": "qwen2_5_vl",
    "qwen3_vl": "qwen3_vl",
    "qwen3_5": "qwen3_5",
    "gemma3": "gemma3",
    "internvl": "internvl_hf",
}

# What the wrappers also want to load, though benchmarks of pictures never use it: the processor's part for videos, for folders
# that say nothing of one.
VIDEO_PARTS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_5": "Qwen3VLVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}


def named(names: str) -> list[str]:
    """--benchmarks as lmms-eval's tasks: "paper" stands for those of the paper that lmms-eval has.

    Raises ValueError if nothing is named.
    """
    tasks: dict[str, None] = {}
    for name in filter(None, (part.strip() for part in names.split(","))):
        tasks |= dict.fromkeys([one.task for one in PAPER if one.task] if name == "paper" else [name])
    if not tasks:
        raise ValueError(f"--benchmarks wants lmms-eval's names of tasks, such as mme,pope, or paper; got {names!r}")
    return list(tasks)


def measures_of(task: str) -> tuple[str, ...]:
    """The measures of a task that the paper reports; () for a task that is not the paper's."""
    return next((one.measures for one in PAPER if one.task == task), ())


def wrapper_of(vlm: str, model_type: str) -> str:
    """Raises ValueError, in one line, for a family that lmms-eval has no wrapper for."""
    if model_type not in WRAPPERS:
        raise ValueError(
            f"{vlm} is a {model_type}, which lmms-eval cannot load; it loads {', '.join(WRAPPERS)}. Its answers can be "
            "measured by evaluate.py --text"
        )
    return WRAPPERS[model_type]
