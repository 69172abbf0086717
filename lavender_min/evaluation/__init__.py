"""Stage 3: where the models look and what they answer, measured, printed and drawn.

    command, flags   the command line of evaluate.py
    compare          finished runs against each other: makes what is missing, measures, writes the report
    own_picture      one's own picture: the answer, and where each of its words looked

    benchmarks       lmms-eval on exported runs (benchmark_names: what it calls things; benchmark_report: table and bars)
    local_task       one's own questions as a task of lmms-eval
    text_quality     BLEU and CIDEr of captions, and answers, on any data

    sheet            what is measured against: texts, and where the things lie that their words name
    models           the models that are measured: loaded, their maps read, their answers generated
    metrics          pointing game, mass inside, entropy, alignment, right answers
    intervals        means over runs with their 95 % intervals, and differences of paired runs
    names            the names of models and measures, and how they are printed
    tables, figures, report     what the reader gets

    localise         how well Stable Diffusion itself finds what a word names, by recipe and layer

Nothing here knows a data set: whatever brings regions for its words (`data.Example.regions`) can be measured.
"""
