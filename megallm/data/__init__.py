"""Data: text to tokens on disk, tokens to samples, samples to batches.

    text files, embedded corpus        documents.py, corpus.py
      -> tokenizer                     tokenizer.py
      -> PREFIX.bin, PREFIX.idx        encode.py, indexed.py, cache.py, prepare.py
      -> samples of S + 1 tokens       dataset.py, permutation.py, blend.py
      -> batches of this dp rank       loader.py

Fine-tuning: rows of files to conversations, comparisons and prompts, to ids with masks.

    .jsonl, .json, embedded rows       records.py, embedded.py
      -> conversations, preferences    convert.py, conversation.py
      -> text with marked answers      chat_template.py, templates.py
      -> ids and what is trained       examples.py, masks.py, show.py
      -> samples, packed or padded     finetune.py, packing.py
      -> batches of this dp rank       loader.py

For reinforcement learning: prompts.py (what is asked, from such records), arithmetic.py (a task that can be checked),
reward_functions.py (what an answer is worth), reward_workers.py, reward_worker.py (the processes for such functions).

Data that a model makes: judged.py, constitution.py, chat_model.py (preferences, revisions); self_instruct.py,
seed_tasks.py, rouge.py (instructions). They are text; who runs the model is trainers/ and cli/.

The order of the samples is a function of (seed, number of samples consumed) and of nothing else.
"""
