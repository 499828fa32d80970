"""A trained model as MLflow serves it: prompts in, texts out. MLflow copies this file into the model and runs it there.

It stands alone: where a model is served, sparktrain is not installed. ``trackers/mlflow.py`` names the file.
"""

from typing import Any

from mlflow.models import set_model
from mlflow.pyfunc.model import PythonModel


class TextGenerator(PythonModel):
    """Continues each prompt; ``params``: max_new_tokens, and temperature, where 0 takes the likeliest token."""

    def load_context(self, context: Any) -> None:
        """Open the Hugging Face directory that was logged."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        self.tokenizer = AutoTokenizer.from_pretrained(context.artifacts["model"])
        self.model: Any = AutoModelForCausalLM.from_pretrained(context.artifacts["model"], use_safetensors=True)

    def predict(self, context: Any, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        """The texts, each with its prompt before it."""
        settings = {"max_new_tokens": 64, "temperature": 0.0} | (params or {})
        hot = settings["temperature"] > 0
        sampling = {"do_sample": True, "temperature": settings["temperature"]} if hot else {"do_sample": False}
        prompts = model_input.iloc[:, 0] if hasattr(model_input, "iloc") else model_input
        texts = []
        for prompt in prompts:
            inputs = self.tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
            room = self.model.config.max_position_embeddings - inputs["input_ids"].shape[1]
            new = min(int(settings["max_new_tokens"]), room)
            out = self.model.generate(**inputs, **sampling, max_new_tokens=new)
            texts.append(str(self.tokenizer.decode(out[0], skip_special_tokens=True)))
        return texts


set_model(TextGenerator())
