//! The same answers and refusals over gRPC, and what its clients find there.

use super::*;

#[tokio::test]
async fn grpc_gives_the_same_answers() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let options = v1::GenerateOptions {
        n: Some(2),
        logprobs: Some(1),
        ..Default::default()
    };
    let stream = client.generate(plain(options)).await.unwrap().into_inner();
    let messages: Vec<v1::GenerateResponse> = stream.map(Result::unwrap).collect().await;
    for index in 0..2 {
        let of_one = || messages.iter().filter(move |m| m.index == index);
        let text: String = of_one().map(|m| m.text.as_str()).collect();
        assert!(text.ends_with(TEXT));
        let ids: Vec<u32> = of_one()
            .flat_map(|m| m.tokens.iter().map(|t| t.id))
            .collect();
        assert_eq!(ids, story(&scene.tokenizer));
        assert_eq!(of_one().filter(|m| m.finish_reason.is_some()).count(), 1);
    }
    let with_usage: Vec<usize> = (0..messages.len())
        .filter(|&i| messages[i].usage.is_some())
        .collect();
    assert_eq!(with_usage, [messages.len() - 1]);
    let once = client
        .generate_once(plain(v1::GenerateOptions::default()))
        .await
        .unwrap()
        .into_inner();
    assert!(once.answers[0].text.ends_with(TEXT));
    assert_eq!(
        once.usage.unwrap().completion_tokens as usize,
        story(&scene.tokenizer).len()
    );

    scene.end().await;
}

#[tokio::test]
async fn grpc_refuses_what_http_refuses_and_says_where() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    type Change = fn(&mut v1::GenerateOptions);
    let changes: [(&str, Change); 8] = [
        ("options.temperature", |o| o.temperature = Some(f32::NAN)),
        ("options.top_p", |o| o.top_p = Some(f32::INFINITY)),
        ("options.n", |o| o.n = Some(1000)),
        ("options.max_tokens", |o| o.max_tokens = Some(5000)),
        ("options.stop", |o| o.stop = vec![String::new()]),
        ("options.prompt_logprobs", |o| o.prompt_logprobs = Some(1)),
        ("options.best_of", |o| o.best_of = Some(2)),
        ("options.logit_bias", |o| {
            o.logit_bias = vec![v1::LogitBias { id: 5, bias: 1.0 }; 2];
        }),
    ];
    for (field, change) in changes {
        let mut options = v1::GenerateOptions::default();
        change(&mut options);
        let refused = client.generate(plain(options)).await.unwrap_err();
        assert_eq!(refused.code(), tonic::Code::InvalidArgument, "{field}");
        let details = refused.get_error_details();
        assert_eq!(
            details.bad_request().unwrap().field_violations[0].field,
            field
        );
        assert_eq!(details.error_info().unwrap().domain, "tramontane");
    }
    let nothing = client
        .generate_once(v1::GenerateRequest::default())
        .await
        .unwrap_err();
    assert_eq!(nothing.code(), tonic::Code::InvalidArgument);

    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[tokio::test]
async fn grpc_tokenizes_and_lists_models() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let ids = client
        .tokenize(v1::TokenizeRequest {
            text: TEXT.to_owned(),
            add_bos: false,
        })
        .await;
    let ids = ids.unwrap().into_inner().ids;
    assert_eq!(ids, scene.tokenizer.encode(TEXT).unwrap());
    let text = client
        .detokenize(v1::DetokenizeRequest { ids })
        .await
        .unwrap()
        .into_inner()
        .text;
    assert_eq!(text, TEXT);
    let models = client
        .list_models(v1::ListModelsRequest {})
        .await
        .unwrap()
        .into_inner()
        .models;
    assert_eq!(
        (models[0].id.as_str(), models[0].context_length),
        ("demo", 2048)
    );
    scene.end().await;
}

#[tokio::test]
async fn reflection_lists_the_services_in_both_versions() {
    use tonic_reflection::pb::{v1 as new, v1alpha as old};
    let scene = Scene::start(config(), vec![storyteller()]).await;
    for (url, served, elsewhere) in [
        (
            &scene.grpc,
            "tramontane.v1.Inference",
            "tramontane.v1.Admin",
        ),
        (
            &scene.admin,
            "tramontane.v1.Admin",
            "tramontane.v1.Inference",
        ),
    ] {
        let channel = channel(url).await;
        let ask = new::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = new::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        };
        let mut client =
            new::server_reflection_client::ServerReflectionClient::new(channel.clone());
        let answer = client
            .server_reflection_info(futures::stream::iter([request]))
            .await
            .unwrap();
        let answer = answer.into_inner().next().await.unwrap().unwrap();
        let answer = answer.message_response.unwrap();
        let new::server_reflection_response::MessageResponse::ListServicesResponse(list) = answer
        else {
            panic!("a list expected")
        };
        let names: Vec<&str> = list.service.iter().map(|s| s.name.as_str()).collect();
        assert!(names.contains(&served) && names.contains(&"grpc.health.v1.Health"));
        assert!(!names.contains(&elsewhere), "{names:?}");
        let ask = old::server_reflection_request::MessageRequest::ListServices(String::new());
        let request = old::ServerReflectionRequest {
            host: String::new(),
            message_request: Some(ask),
        };
        let mut client = old::server_reflection_client::ServerReflectionClient::new(channel);
        let answer = client
            .server_reflection_info(futures::stream::iter([request]))
            .await
            .unwrap();
        assert!(answer.into_inner().next().await.unwrap().is_ok());
    }
    let mut outside = AdminClient::new(channel(&scene.grpc).await);
    let asked = outside.cluster_status(v1::ClusterStatusRequest {}).await;
    assert_eq!(asked.unwrap_err().code(), tonic::Code::Unimplemented);
    scene.end().await;
}

#[tokio::test]
async fn a_prompt_is_told_of_once_and_shown_in_every_answer() {
    let tells = scripted(|request| {
        let sampling = request.sampling.as_ref().unwrap();
        let mut steps = vec![Step::Started(0)];
        if sampling.prompt_logprobs.is_some() {
            steps.push(Step::PromptTokens(1, request.prompt_ids[1..].to_vec()));
        }
        steps.extend([Step::Token(300), Step::Finish(v1::FinishReason::Length)]);
        Ok(steps)
    });
    let scene = Scene::start(config(), vec![tells]).await;
    let num_asked = || {
        let mut seen = scene.workers[0].seen.lock();
        let asked = seen.drain(..).filter(|request| {
            let sampling = request.sampling.as_ref().unwrap();
            sampling.prompt_logprobs.is_some()
        });
        asked.count()
    };
    let prompts = [[1, 300, 301, 302], [1, 303, 304, 305]];
    let body = json!({ "prompt": prompts, "n": 3, "max_tokens": 1, "prompt_logprobs": 1 });
    let response = scene.post("/v1/completions", &body).await;
    let whole: Value = response.json().await.unwrap();
    assert_eq!(num_asked(), 2, "once per prompt: {whole}");
    for i in 0..6 {
        let told = &whole["choices"][i]["prompt_logprobs"];
        for (entry, id) in told.as_array().unwrap()[1..]
            .iter()
            .zip(&prompts[i / 3][1..])
        {
            assert_eq!(entry[id.to_string()]["rank"], 1, "{told}");
        }
        assert_eq!(told.as_array().unwrap().len(), 4);
    }
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let options = v1::GenerateOptions {
        n: Some(3),
        max_tokens: Some(1),
        prompt_logprobs: Some(1),
        ..v1::GenerateOptions::default()
    };
    let once = client.generate_once(plain(options)).await.unwrap();
    assert_eq!(num_asked(), 1);
    let answers = once.into_inner().answers;
    assert!(!answers[0].prompt_tokens.is_empty());
    for answer in &answers {
        assert_eq!(answer.prompt_tokens, answers[0].prompt_tokens);
    }
    scene.end().await;
}

#[tokio::test]
async fn more_log_probabilities_than_the_limit_are_refused_by_the_name_of_their_field() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let options = v1::GenerateOptions {
        n: Some(128),
        logprobs: Some(20),
        max_tokens: Some(49),
        ..v1::GenerateOptions::default()
    };
    let refused = client.generate_once(plain(options)).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("at most 131072"), "{refused}");
    let violations = refused.get_details_bad_request().unwrap().field_violations;
    assert_eq!(violations[0].field, "options.logprobs");
    let body = json!({ "logprobs": true, "top_logprobs": 20, "n": 128, "max_tokens": 49 });
    let refused = scene.chat(body).await;
    assert_eq!(refused.status(), 400);
    let error: Value = refused.json().await.unwrap();
    assert_eq!(error["error"]["param"], "top_logprobs");
    assert!(scene.workers[0].seen.lock().is_empty());
    scene.end().await;
}

#[tokio::test]
async fn ids_have_one_limit_at_both_doors() {
    let scene = Scene::start(config(), vec![storyteller()]).await;
    let client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let client = &mut client.max_decoding_message_size(8 << 20);
    let mut ask = async |num: usize| {
        let ids = vec![300; num];
        client.detokenize(v1::DetokenizeRequest { ids }).await
    };
    let refused = ask(655_001).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(refused.message().contains("at most 655000"), "{refused}");
    ask(655_000).await.unwrap();
    // No token of its own: one for each of its four bytes.
    let text = "\u{12345}".repeat(163_800);
    let mut client = InferenceClient::connect(scene.grpc.clone()).await.unwrap();
    let asked = v1::TokenizeRequest {
        text,
        add_bos: false,
    };
    let refused = client.tokenize(asked).await.unwrap_err();
    assert_eq!(refused.code(), tonic::Code::InvalidArgument);
    assert!(
        refused
            .message()
            .starts_with("text must have at most 655000")
    );
    scene.end().await;
}
