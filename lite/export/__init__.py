"""The export room: a run or a model's folder becomes what other programs run, and proves it.

One file a target, each with `names`, `write` and `check`: safetensors.py, gguf.py, adapter.py, gguf_adapter.py,
ollama.py, gptq.py (GPTQ and AWQ, in a process of their own: quantised_apart.py). order.py is what is asked for, and
export.py the story: written aside, proved, and only then named.

proof.py compares GGUFs with the model that they were made of: prompts.py says what is asked, logits.py runs the model
with one module's weights in memory, closeness.py measures how near its next words are, and findings.py has it in words.
importance.py has the model read rows for an importance matrix. ollama_template.py finds the chat template in Go,
go_template.py and go_pipeline.py run it as Ollama would, modelfile.py is the file around it.
"""
