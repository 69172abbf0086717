"""lmms-eval's names: of its tasks for the paper's benchmarks, and of its wrappers, which load the models."""

from typing import NamedTuple


class Benchmark(NamedTuple):
    """One of the paper's benchmarks."""

    # Its name in tables and figures.
    title: str
    # lmms-eval's task; "" where it has none.
    task: str
    # The task's measures that the paper reports. Of MME it reports the sum of the two.
    measures: tuple[str, ...] = ()
    # Whether the task asks a model of OpenAI's to judge answers that cannot be read by rules.
    judged: bool = False


# The twenty of the paper's section 7.2, which counts MMBench as four. Its Table 1 has sixteen, with only one MMBench.
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

# model_type ─► the processor's class for videos. The wrappers load it, though tasks on pictures never use it. It is needed for
# folders whose processor_config.json names none (see `benchmarks.complete`).
VIDEO_PARTS = {
    "llava_onevision": "LlavaOnevisionVideoProcessor",
    "qwen2_vl": "Qwen2VLVideoProcessor",
    "qwen2_5_vl": "Qwen2VLVideoProcessor",
    "qwen3_vl": "Qwen3VLVideoProcessor",
    "qwen3_5": "Qwen3VLVideoProcessor",
    "internvl": "InternVLVideoProcessor",
}


def named(names: str) -> list[str]:
    """The tasks that --benchmarks names, each once; "paper" stands for all of the paper's that lmms-eval has.

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
    """lmms-eval's wrapper for hosts of this model_type. Raises ValueError, in one line, if it has none; `vlm` is for that line."""
    if model_type not in WRAPPERS:
        raise ValueError(
            f"{vlm} is a {model_type}, which lmms-eval cannot load; it loads {', '.join(WRAPPERS)}. Its answers can be "
            "measured by evaluate.py --text"
        )
    return WRAPPERS[model_type]
