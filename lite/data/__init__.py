"""The data room: from the user's file to token ids, with every row's place kept and every row's fate recorded.

A row becomes a typed example (`formats`, `reading`), an example becomes token ids through the model's chat template
(`template`, `tokenise`), some are held out (`held_out`), and the ledger says what was kept, cut, dropped or bad.
What a row says beside its texts is read once for all layouts (`columns`); KTO's rows get a `partners` completion and
`balance` looks at their labels. `prepare` tells that story whole; `packs` lays the token examples out for the model. A
user's mistakes are collected with file and line and raised once. Importing the room imports neither torch nor
transformers.
"""

from lite.data.examples import Example, Place, Preference, PromptCompletion, TokenExample, UnpairedPreference
from lite.data.ledger import Ledger
from lite.data.prepare import Prepared, prepare

__all__ = [
    "Example",
    "Ledger",
    "Place",
    "Preference",
    "Prepared",
    "PromptCompletion",
    "TokenExample",
    "UnpairedPreference",
    "prepare",
]
