// {{ model.artifact | comment }} as a library module of an Android app. Written by edgebuild; do not edit.
plugins {
    id("com.android.library")
    id("org.jetbrains.kotlin.android")
}

android {
    namespace = "{{ package }}"
    compileSdk = 35

    defaultConfig {
        minSdk = 23
    }
    androidResources {
        noCompress += "pte"
    }
    compileOptions {
        sourceCompatibility = JavaVersion.VERSION_17
        targetCompatibility = JavaVersion.VERSION_17
    }
}

kotlin {
    jvmToolchain(17)
}

dependencies {
    implementation("org.pytorch:executorch-android:{{ model.runtime }}")
}
